"""What is compared: variants of one recipe, and the ablations that put them side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.demo_base.captions import article
from benchmarks.quality.subjects import RANDOM_NOUNS, Subject

RECIPE: Mapping[str, Any] = {
    "model.base": "demo",
    "device": "cpu",
    "data.resolution": 128,
    "prior.num_class_images": 24,
    "prior.sampler": "ddim",
    "prior.num_inference_steps": 16,
    "prior.guidance_scale": 2.0,
    "prior.sample_batch_size": 8,
    "training.max_train_steps": 100,
    "training.train_batch_size": 2,
    "training.learning_rate": 1e-3,
    "training.learning_rate_text_encoder": 2e-4,
    "training.lr_scheduler": "cosine",
    "training.lr_warmup_steps": 10,
    "training.train_text_encoder": True,
    "logging.tensorboard": False,
}
"""Fields of the configuration that all runs share, where a variant does not say otherwise."""

RARE_TOKEN = "sks"
NUM_IMAGES = 4
"""Images of each prompt that are drawn and scored."""
NounChoice = Literal["right", "wrong", "random", "missing"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train.

    Attributes:
        fields: Fields of the configuration that differ from ``RECIPE``.
        identifier: What names the subject in the prompt.
        noun: The class noun in the prompt of the photos: of the subject, chosen by hand, drawn at random, or none.
        num_images: How many pictures of the subject are trained on.
        trained: Whether anything is trained; the base as it is otherwise.
        guidance_scale: Classifier-free guidance of the images that are scored.
        contexts: What follows the prompt of the photos when the subject is drawn in new places.
        further: Returns the prompts of further class images, some of other nouns, for a class noun; None: all class
            images are of the class.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    identifier: str = RARE_TOKEN
    noun: NounChoice = "right"
    num_images: int = 5
    trained: bool = True
    guidance_scale: float = 1.0
    contexts: tuple[str, ...] = ("in the snow",)
    further: Callable[[str], list[str]] | None = None

    def noun_of(self, subject: Subject) -> str:
        """Return the noun that stands in the prompts; empty where it is missing."""
        if self.noun == "random":
            return RANDOM_NOUNS[subject.name]
        return {"right": subject.noun, "wrong": subject.wrong_noun, "missing": ""}[self.noun]

    def instance_prompt(self, subject: Subject) -> str:
        """Return the prompt of the photos."""
        return f"a {self.identifier} {self.noun_of(subject)}".strip()

    def class_noun(self, subject: Subject) -> str:
        """Return the noun of the class images: that of the prompts, or the right one where it is missing."""
        return self.noun_of(subject) or subject.noun


def with_animals(noun: str) -> list[str]:
    """Return the prompts that make five eighths of the class images of a noun, and three of others.

    Another animal stands in where the noun is one of them.
    """
    animal, flyer = "a cat" if noun != "cat" else "a dog", "a bird" if noun != "bird" else "a fish"
    own = article(noun)
    return [own, own, animal, own, own, f"{animal} on the beach", f"{flyer} in the snow"]


WITHOUT_PRIOR = {"prior.enabled": False}
EIGHT_BIT = {"optimizer.name": "adamw8bit"}
FIDELITY, PRESERVATION, DIVERSITY, CLASS_KEPT = "EN0-I", "EN0-PRES", "EN0-DIV", "EN0-CLASS"
IDENTITY, PLACE = "ID-I", "CAP-BG"


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Variants side by side.

    Attributes:
        title: Heading.
        question: What is asked, and what is held fixed.
        labels: The variants and what they are called.
        reference: The variant that the others are compared with.
        metrics: The metrics that answer it.
        paper: What is expected of the paper's claims: metric, variant, and +1, 0 or -1 against the reference.
        paper_text: Where the paper treats it, in words.
        subjects: Names of the subjects.
        seeds: Seeds of each variant but the untrained one.
        figures: The paper's own figures of a variant, where it has some.
    """

    title: str
    question: str
    labels: Mapping[str, str]
    reference: str
    metrics: tuple[str, ...]
    paper: Mapping[tuple[str, str], int]
    paper_text: str
    subjects: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    figures: Mapping[str, str] = field(default_factory=dict)


def runs_of(ablation: Ablation, variants: Mapping[str, Variant]) -> list[tuple[str, str, int]]:
    """Return variant, subject and seed of every run of an ablation; the first seed of all subjects comes first."""
    names = list(dict.fromkeys([ablation.reference, *ablation.labels]))
    return [
        (variant, subject, seed)
        for seed in ablation.seeds
        for subject in ablation.subjects
        for variant in names
        if variants[variant].trained or seed == ablation.seeds[0]
    ]
