"""The list of the paper's questions on ten drawn subjects, in the demo's first recipe with 300 steps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.quality.subjects import TEN
from benchmarks.quality.variants import (
    CLASS_KEPT,
    DIVERSITY,
    EIGHT_BIT,
    FIDELITY,
    IDENTITY,
    PLACE,
    PRESERVATION,
    WITHOUT_PRIOR,
    Ablation,
    Variant,
    with_animals,
)
from lowmem_db.config.schema import TrainingConfig

LIKE_DEMO: Mapping[str, Any] = {
    "prior.num_class_images": 64,
    "prior.num_inference_steps": 30,
    "training.max_train_steps": 300,
    "training.learning_rate": 3e-4,
    "training.learning_rate_text_encoder": 1e-4,
    "training.lr_warmup_steps": 20,
    "objective.conditioning_dropout": 0.1,
    "ema.enabled": True,
    "ema.decay": 0.98,
}
"""The demo's recipe on its base of 42 nouns (commit 23fb34b), with half of its steps. Chosen on the drawn dog and the
clock, which are not among the ten."""

CONTEXTS = ("in the snow", "on the beach", "at night")
STEPS_PER_IMAGE = 60


def _variant(fields: Mapping[str, Any] | None = None, **others: Any) -> Variant:
    return Variant(
        fields={**LIKE_DEMO, **(fields or {})},
        guidance_scale=2.0,
        contexts=CONTEXTS,
        further=with_animals,
        **others,
    )


def _seen_as_often(num_images: int) -> Variant:
    """Return the reference with fewer pictures, each of which is trained on as often as in the reference."""
    steps = {"training.max_train_steps": STEPS_PER_IMAGE * num_images, "training.lr_warmup_steps": 4 * num_images}
    return _variant(steps, num_images=num_images)


WORD = "<subject>"
LEARN_A_WORD: Mapping[str, Any] = {
    **WITHOUT_PRIOR,
    "training.train_text_encoder": False,
    "training.learning_rate": TrainingConfig().learning_rate,  # has no effect, and may not be set to another
    "training.learning_rate_text_encoder": None,
    "textual_inversion.enabled": True,
    "textual_inversion.token": WORD,
    "textual_inversion.templates": "prompt",
    "textual_inversion.learning_rate": 1e-2,
}
"""Textual Inversion in the same steps, at the rate of its authors' code: 5e-3 times the batch size."""

EARLY: Mapping[str, Any] = {"training.max_train_steps": 100, "training.lr_warmup_steps": 7}
"""A third of the steps, to see whether a wrong noun slows learning down."""

VARIANTS: Mapping[str, Variant] = {
    "demo_untrained": _variant(trained=False),
    "demo": _variant(),
    "demo_without_prior": _variant(WITHOUT_PRIOR),
    "demo_random_noun": _variant(noun="random"),
    "demo_no_noun": _variant(noun="missing"),
    "demo_early": _variant(EARLY),
    "demo_early_random_noun": _variant(EARLY, noun="random"),
    "demo_early_no_noun": _variant(EARLY, noun="missing"),
    "demo_early_common_word": _variant(EARLY, identifier="pink"),
    "demo_early_random_letters": _variant(EARLY, identifier="xxy5syt00"),
    "demo_1_image": _seen_as_often(1),
    "demo_1_image_all_steps": _variant(num_images=1),
    "demo_2_images": _seen_as_often(2),
    "demo_3_images": _seen_as_often(3),
    "demo_4_images": _seen_as_often(4),
    "demo_common_word": _variant(identifier="pink"),
    "demo_random_letters": _variant(identifier="xxy5syt00"),
    "demo_textual_inversion": _variant(LEARN_A_WORD, identifier=WORD, noun="missing"),
    "demo_again": _variant({"training.learning_rate": 1.001 * LIKE_DEMO["training.learning_rate"]}),
    "demo_adamw8bit": _variant(EIGHT_BIT),
    "demo_24bit_weights": _variant({**EIGHT_BIT, "memory.weights": "bf16_extra_bits"}),
    "demo_stochastic_rounding": _variant({**EIGHT_BIT, "memory.weights": "bf16_stochastic"}),
}

NAMES = tuple(subject.name for subject in TEN)
FIVE = NAMES[:5]
OF_ONE_TOKEN = NAMES[1:6]
"""The first five whose noun is one token of the base, as the word of Textual Inversion has to begin."""
IN_CONTEXT, OF_CLASS = "ID-I context", "ID-PRES"

TABLE_4 = Ablation(
    title="Class noun right, wrong, missing (Table 4)",
    question="The wrong noun is drawn at random from those of the ten subjects "
    "(`benchmarks.quality.subjects.RANDOM_NOUNS`), and the class images are of it. With no noun (`a sks`) they are "
    "of the right one.",
    labels={
        "demo": "right",
        "demo_random_noun": "wrong",
        "demo_no_noun": "none",
        "demo_untrained": "untrained base, right noun",
    },
    reference="demo",
    metrics=(FIDELITY, IDENTITY, IN_CONTEXT, PRESERVATION, OF_CLASS, DIVERSITY, CLASS_KEPT, PLACE),
    paper={
        (FIDELITY, "demo_random_noun"): -1,
        (IDENTITY, "demo_random_noun"): -1,
        (FIDELITY, "demo_no_noun"): -1,
        (IDENTITY, "demo_no_noun"): -1,
    },
    paper_text="Table 4 (Imagen, 5 subjects; the wrong noun is drawn at random).",
    subjects=NAMES,
    seeds=(0, 1),
    figures={
        "demo": "DINO 0.744, CLIP-I 0.853",
        "demo_random_noun": "DINO 0.454, CLIP-I 0.728",
        "demo_no_noun": "DINO 0.303, CLIP-I 0.607",
    },
)

IDENTIFIERS = Ablation(
    title="Identifier: rare token, common word, random letters (section 3.2)",
    question="`a sks shoe`, `a pink shoe`, `a xxy5syt00 shoe`.",
    labels={
        "demo": "rare token",
        "demo_common_word": "common word",
        "demo_random_letters": "random letters",
        "demo_untrained": "untrained base",
    },
    reference="demo",
    metrics=(FIDELITY, IDENTITY, IN_CONTEXT, OF_CLASS, CLASS_KEPT, PLACE),
    paper={
        (metric, f"demo_{words}"): -1 for words in ("common_word", "random_letters") for metric in (FIDELITY, IDENTITY)
    },
    paper_text="Section 3.2, in words: existing words are “suboptimal”, random characters have “similar weaknesses”.",
    subjects=FIVE,
)


def _early(late: Ablation, **texts: str) -> Ablation:
    """Return the same with a third of the steps, which the paper has no figures of, and one seed."""

    def early(name: str) -> str:
        return name.replace("demo", "demo_early", 1) if VARIANTS[name].trained else name

    return replace(
        late,
        labels={early(name): label for name, label in late.labels.items()},
        reference=early(late.reference),
        paper={(metric, early(name)): direction for (metric, name), direction in late.paper.items()},
        figures={},
        seeds=(0,),
        **texts,
    )


ABLATIONS: Mapping[str, Ablation] = {
    "table_3": Ablation(
        title="Prior preservation on and off (Table 3, figures 6 and 19)",
        question="Off: the same steps on the five pictures alone.",
        labels={"demo": "on", "demo_without_prior": "off", "demo_untrained": "untrained base"},
        reference="demo",
        metrics=(FIDELITY, IDENTITY, IN_CONTEXT, PRESERVATION, OF_CLASS, DIVERSITY, CLASS_KEPT, PLACE),
        paper={
            (FIDELITY, "demo_without_prior"): 1,
            (IDENTITY, "demo_without_prior"): 1,
            (PRESERVATION, "demo_without_prior"): 1,
            (OF_CLASS, "demo_without_prior"): 1,
            (DIVERSITY, "demo_without_prior"): -1,
        },
        paper_text="Table 3 (Imagen, 15 subjects; CLIP-I 0.815 with and 0.828 without, CLIP-T 0.308 and 0.306). Figure "
        "19 shows PRES, figure 6 DIV.",
        subjects=NAMES,
        seeds=(0, 1),
        figures={
            "demo": "DINO 0.684, PRES 0.493, DIV 0.391",
            "demo_without_prior": "DINO 0.712, PRES 0.664, DIV 0.371",
        },
    ),
    "table_4": TABLE_4,
    "table_4_early": _early(
        TABLE_4,
        title="Class noun right, wrong, missing, after a third of the steps",
        question="Does a wrong noun only slow learning down, so that 300 steps hide it? 100 steps, all else as above.",
        paper_text="Table 4, as above.",
    ),
    "table_5": Ablation(
        title="One to five pictures of the subject (Table 5)",
        question="The first pictures of each subject; every picture is trained on equally often, so that one picture "
        "has 60 steps and five have 300. Fidelity is measured against all five.",
        labels={
            "demo_1_image": "1",
            "demo_2_images": "2",
            "demo_3_images": "3",
            "demo_4_images": "4",
            "demo": "5",
            "demo_untrained": "untrained base",
        },
        reference="demo",
        metrics=(FIDELITY, IDENTITY, IN_CONTEXT, DIVERSITY, OF_CLASS, PLACE),
        paper={(metric, f"demo_{number}"): -1 for number in ("1_image", "2_images") for metric in (FIDELITY, IDENTITY)},
        paper_text="Table 5 (2 subjects, 10 recontextualization prompts, 4 images each); four are best. The paper does "
        "not say whether the steps were the same.",
        subjects=FIVE,
        figures={
            "demo_1_image": "DINO, backpack 0.494, dog 0.798",
            "demo_2_images": "0.515, 0.851",
            "demo_3_images": "0.596, 0.871",
            "demo_4_images": "0.604, 0.876",
            "demo": "0.597, 0.864",
        },
    ),
    "table_5_steps": Ablation(
        title="One picture, and as many steps as for five",
        question="Is it the picture or the number of steps? One picture in 300 steps is seen 600 times.",
        labels={
            "demo": "5 pictures, 300 steps",
            "demo_1_image": "1 picture, 60 steps",
            "demo_1_image_all_steps": "1 picture, 300 steps",
            "demo_untrained": "untrained base",
        },
        reference="demo",
        metrics=(FIDELITY, IDENTITY, IN_CONTEXT, DIVERSITY, OF_CLASS, PLACE),
        paper={(FIDELITY, "demo_1_image_all_steps"): -1, (IDENTITY, "demo_1_image_all_steps"): -1},
        paper_text="Table 5, as above.",
        subjects=FIVE,
    ),
    "identifiers": IDENTIFIERS,
    "identifiers_early": _early(
        IDENTIFIERS,
        title="Identifier, after a third of the steps",
        question="Has a word that means something to be unlearnt first? 100 steps, all else as above.",
        paper_text="Section 3.2, as above: existing words have to be disentangled from their meaning.",
    ),
    "saving_memory": Ablation(
        title="Does saving memory cost quality?",
        question="Same seeds, so the same batches, noise and timesteps. With 24-bit weights and with stochastic "
        "rounding the model computes in bf16, as on a card; samples are drawn in fp32, as from `final/`. A learning "
        "rate that is 0.1 % higher shows how far apart runs come by chance alone.",
        labels={
            "demo": "AdamW, fp32 weights",
            "demo_again": "the same, learning rate 0.1 % higher",
            "demo_adamw8bit": "8-bit AdamW, fp32 weights",
            "demo_24bit_weights": "8-bit AdamW, 24-bit weights, bf16",
            "demo_stochastic_rounding": "8-bit AdamW, stochastic rounding, bf16",
        },
        reference="demo",
        metrics=("loss_instance", "loss_prior", FIDELITY, IDENTITY, IN_CONTEXT, OF_CLASS, CLASS_KEPT, PLACE),
        paper={},
        paper_text="Not in the paper. The hope is that nothing differs.",
        subjects=FIVE,
    ),
    "table_1": Ablation(
        title="DreamBooth and Textual Inversion (Table 1)",
        question="Textual Inversion learns one word (`a <subject>`), which begins as the class noun, in as many steps "
        "on the same five pictures; no weight changes, so there is nothing to preserve.",
        labels={
            "demo": "DreamBooth",
            "demo_textual_inversion": "Textual Inversion",
            "demo_untrained": "untrained base",
        },
        reference="demo",
        metrics=(FIDELITY, IDENTITY, IN_CONTEXT, DIVERSITY, PLACE),
        paper={(FIDELITY, "demo_textual_inversion"): -1, (IDENTITY, "demo_textual_inversion"): -1},
        paper_text="Table 1 (30 subjects). Its last column, CLIP-T, is 0.305 and 0.255; `CAP-BG` stands for it here.",
        subjects=OF_ONE_TOKEN,
        figures={
            "demo": "Stable Diffusion: DINO 0.668, CLIP-I 0.803",
            "demo_textual_inversion": "DINO 0.569, CLIP-I 0.780",
        },
    ),
}
