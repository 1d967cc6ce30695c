"""The first regimes: 100 steps at 1e-3, and 300 at 3e-4 with class images of the class prompt alone."""

from collections.abc import Mapping

from benchmarks.quality.subjects import FIRST_SUBJECTS
from benchmarks.quality.variants import (
    CLASS_KEPT,
    DIVERSITY,
    EIGHT_BIT,
    FIDELITY,
    PLACE,
    PRESERVATION,
    RECIPE,
    WITHOUT_PRIOR,
    Ablation,
    Variant,
)

GENTLE = {
    "training.max_train_steps": 300,
    "training.learning_rate": 3e-4,
    "training.learning_rate_text_encoder": 1e-4,
    "training.lr_warmup_steps": 20,
    "objective.conditioning_dropout": 0.1,
}
"""More steps at a lower rate, and the empty prompt kept for guidance. Chosen on the drawn dog and the clock."""

VARIANTS: Mapping[str, Variant] = {
    "untrained": Variant(trained=False),
    "reference": Variant(),
    "without_prior": Variant(fields=WITHOUT_PRIOR),
    "wrong_noun": Variant(fields=WITHOUT_PRIOR, noun="wrong"),
    "no_noun": Variant(fields=WITHOUT_PRIOR, noun="missing"),
    "wrong_noun_with_prior": Variant(noun="wrong"),
    "no_noun_with_prior": Variant(noun="missing"),
    "1_image": Variant(num_images=1),
    "2_images": Variant(num_images=2),
    "3_images": Variant(num_images=3),
    "4_images": Variant(num_images=4),
    "frozen_text_encoder": Variant(
        fields={"training.train_text_encoder": False, "training.learning_rate_text_encoder": None}
    ),
    "lambda_0.3": Variant(fields={"prior.loss_weight": 0.3}),
    "lambda_3": Variant(fields={"prior.loss_weight": 3.0}),
    "4_class_images": Variant(fields={"prior.num_class_images": 4}),
    "adamw8bit": Variant(fields=EIGHT_BIT),
    "adamw8bit_24bit_weights": Variant(fields={**EIGHT_BIT, "memory.weights": "bf16_extra_bits"}),
    "adamw8bit_stochastic_rounding": Variant(fields={**EIGHT_BIT, "memory.weights": "bf16_stochastic"}),
    "nearly_the_reference": Variant(fields={"training.learning_rate": 1.001 * RECIPE["training.learning_rate"]}),
    "gentle_untrained": Variant(trained=False, guidance_scale=2.0),
    "gentle": Variant(fields=GENTLE, guidance_scale=2.0),
    "gentle_without_prior": Variant(fields=GENTLE | WITHOUT_PRIOR, guidance_scale=2.0),
    "gentle_wrong_noun": Variant(fields=GENTLE, noun="wrong", guidance_scale=2.0),
    "gentle_no_noun": Variant(fields=GENTLE, noun="missing", guidance_scale=2.0),
    "common_word": Variant(identifier="pink"),
    "random_letters": Variant(identifier="xxy5syt00"),
}

RICH = tuple(subject.name for subject in FIRST_SUBJECTS if subject.rich)
MIXED = (
    "drawn_dog", "dog3", "drawn_clock", "robot_toy", "drawn_car", "bear_plushie", "drawn_cat", "drawn_flower",
)  # fmt: skip
GENTLE_SUBJECTS = ("drawn_car", "drawn_flower", "drawn_cat")

ABLATIONS: Mapping[str, Ablation] = {
    "gentle": Ablation(
        title="In a gentler regime: prior preservation, and the class noun right, wrong, missing",
        question="300 steps at 3e-4 (text encoder 1e-4), a tenth of the prompts empty, images drawn with guidance 2. "
        "It was chosen by eye on the drawn dog and the drawn clock, which are not among these subjects, and then left "
        "as it is. With a wrong noun the class images are of that noun, with none they are of the right one. `CAP-BG`: "
        "share of the images in context whose background the caption classifier names rightly.",
        labels={
            "gentle": "right noun",
            "gentle_without_prior": "right noun, prior preservation off",
            "gentle_wrong_noun": "wrong noun",
            "gentle_no_noun": "no noun",
            "gentle_untrained": "untrained base",
        },
        reference="gentle",
        metrics=(FIDELITY, "EN0-I plain", "EN0-I context", PLACE, PRESERVATION, DIVERSITY, CLASS_KEPT),
        paper={
            (FIDELITY, "gentle_without_prior"): 1,
            (PRESERVATION, "gentle_without_prior"): 1,
            (DIVERSITY, "gentle_without_prior"): -1,
            (FIDELITY, "gentle_wrong_noun"): -1,
            (FIDELITY, "gentle_no_noun"): -1,
        },
        paper_text="Table 3 (Imagen, 15 subjects), without and with prior preservation: PRES 0.664 and 0.493, DIV "
        "0.371 and 0.391. Table 4 (5 subjects): DINO 0.744 with the right noun, 0.454 with a wrong one, 0.303 with "
        "none.",
        subjects=GENTLE_SUBJECTS,
    ),
    "prior": Ablation(
        title="Prior preservation on and off",
        question="Subjects whose class the base learned from several designs. Off: the same steps on the subject's "
        "pictures alone. λ = 0 has the gradients of off.",
        labels={"without_prior": "off", "reference": "on (λ = 1)", "untrained": "untrained base"},
        reference="without_prior",
        metrics=(FIDELITY, PRESERVATION, DIVERSITY, CLASS_KEPT),
        paper={
            (FIDELITY, "reference"): -1,
            (PRESERVATION, "reference"): -1,
            (DIVERSITY, "reference"): 1,
        },
        paper_text="Table 3 (Imagen, 15 subjects), without and with prior preservation: PRES 0.664 and 0.493, DIV "
        "0.371 and 0.391, DINO 0.712 and 0.684, CLIP-I 0.828 and 0.815, CLIP-T 0.306 and 0.308. Figure 19 shows PRES, "
        "figure 6 DIV.",
        subjects=RICH,
        seeds=(0, 1),
    ),
    "training": Ablation(
        title="Text encoder, λ and number of class images",
        question="One thing changed at a time. λ = 0 is prior preservation off, from the first ablation.",
        labels={
            "reference": "text encoder trained, λ = 1, 24 class images",
            "frozen_text_encoder": "text encoder frozen",
            "without_prior": "λ = 0",
            "lambda_0.3": "λ = 0.3",
            "lambda_3": "λ = 3",
            "4_class_images": "4 class images",
        },
        reference="reference",
        metrics=(FIDELITY, PRESERVATION, DIVERSITY, CLASS_KEPT),
        paper={(FIDELITY, "frozen_text_encoder"): -1, (PRESERVATION, "without_prior"): 1},
        paper_text="No table. Section 3.3: fidelity is best with all layers trained, those conditioned on the text "
        "among them; λ is 1, and of about 1,000 class images “less can be used”.",
        subjects=MIXED,
    ),
    "memory": Ablation(
        title="Does saving memory cost quality?",
        question="Same seeds, so the same batches, noise and timesteps. With 24-bit weights and with stochastic "
        "rounding the model computes in bf16, as on a card; samples are drawn in fp32, as from `final/`. A learning "
        "rate that is 0.1 % higher shows how far apart runs come by chance alone.",
        labels={
            "reference": "AdamW, fp32 weights",
            "nearly_the_reference": "the same, learning rate 0.1 % higher",
            "adamw8bit": "8-bit AdamW, fp32 weights",
            "adamw8bit_24bit_weights": "8-bit AdamW, 24-bit weights, bf16",
            "adamw8bit_stochastic_rounding": "8-bit AdamW, stochastic rounding, bf16",
        },
        reference="reference",
        metrics=("loss_instance", "loss_prior", FIDELITY, PRESERVATION, CLASS_KEPT),
        paper={},
        paper_text="Not in the paper. The hope is that nothing differs.",
        subjects=MIXED,
    ),
    "noun": Ablation(
        title="Class noun right, wrong, missing",
        question="Prior preservation off in all of them, because without a noun there are no class images.",
        labels={"without_prior": "right", "wrong_noun": "wrong", "no_noun": "missing", "untrained": "untrained base"},
        reference="without_prior",
        metrics=(FIDELITY, "EN0-I plain", "EN0-I context", PRESERVATION),
        paper={(FIDELITY, "wrong_noun"): -1, (FIDELITY, "no_noun"): -1},
        paper_text="Table 4 (Imagen, 5 subjects; the wrong noun is drawn at random): DINO 0.744 with the right noun, "
        "0.454 with a wrong one, 0.303 with none; CLIP-I 0.853, 0.728, 0.607.",
        subjects=MIXED,
    ),
    "noun_with_prior": Ablation(
        title="Class noun right, wrong, missing, with prior preservation",
        question="The class images are of the noun in the prompt; of the right one where it is missing.",
        labels={"reference": "right", "wrong_noun_with_prior": "wrong", "no_noun_with_prior": "missing"},
        reference="reference",
        metrics=(FIDELITY, "EN0-I plain", "EN0-I context", PRESERVATION, CLASS_KEPT),
        paper={(FIDELITY, "wrong_noun_with_prior"): -1, (FIDELITY, "no_noun_with_prior"): -1},
        paper_text="Table 4, as above.",
        subjects=MIXED,
    ),
    "identifier": Ablation(
        title="Identifier: rare token, common word, random letters",
        question="`a sks dog`, `a pink dog`, `a xxy5syt00 dog`.",
        labels={"reference": "rare token", "common_word": "common word", "random_letters": "random letters"},
        reference="reference",
        metrics=(FIDELITY, PRESERVATION, CLASS_KEPT),
        paper={(FIDELITY, "common_word"): -1, (FIDELITY, "random_letters"): -1},
        paper_text="Section 3.2, in words: existing words are “suboptimal”, random characters have “similar "
        "weaknesses”.",
        subjects=MIXED,
    ),
    "images": Ablation(
        title="One to five pictures of the subject",
        question="The first pictures of each subject; the same number of steps. Fidelity is measured against all five.",
        labels={"1_image": "1", "2_images": "2", "3_images": "3", "4_images": "4", "reference": "5"},
        reference="reference",
        metrics=(FIDELITY, DIVERSITY, PRESERVATION),
        paper={(FIDELITY, "1_image"): -1},
        paper_text="Table 5, DINO with 1 to 5 pictures: backpack 0.494 0.515 0.596 0.604 0.597, dog 0.798 0.851 0.871 "
        "0.876 0.864; four are best (2 subjects, 10 recontextualization prompts, 4 images each). Table 6 is headed "
        "CLIP-T, but cannot be: its row for the backpack is Table 5's for the dog, and its row for the dog (0.646 "
        "0.683 0.734 0.740 0.730) is far above every CLIP-T of Tables 1 and 3 (0.255 to 0.308).",
        subjects=MIXED,
    ),
}  # fmt: skip
