"""The questions of ``ten_subjects`` on the base as it is now, in the recipe of ``configs/demo.yaml``, half its steps.

Its class images keep places with nouns that have nothing of the subject, so that a higher learning rate does no harm.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality import ten_subjects
from benchmarks.quality.ten_subjects import LIKE_DEMO
from benchmarks.quality.variants import Ablation, Variant
from lowmem_db.config.recipes import Wish, fields_for

RECIPE: Mapping[str, Any] = {
    **LIKE_DEMO,
    "prior.num_class_images": 90,
    "training.learning_rate": 6e-4,
    "training.learning_rate_text_encoder": 3e-4,
}
CHOSEN_ON = "drawn_cat"
"""The subject that the recipe was chosen on (``docs/log.md``), and which is left out."""


def further_class_prompts(noun: str) -> list[str]:
    """Return the prompts of the demo's further class images, for another class noun."""
    wish = Wish(photos=Path(), noun=noun, recipe="demo", output_dir=Path())
    return list(fields_for(wish)["prior"]["class_prompts"])


def _named(earlier: str) -> str:
    """Return the name here of a variant of the earlier recipe."""
    return earlier.replace("demo", "places", 1)


def _variant(earlier: Variant) -> Variant:
    """Return a variant of the earlier recipe in this one: what it changes there it changes here."""
    changed = {name: value for name, value in earlier.fields.items() if (name, value) not in LIKE_DEMO.items()}
    return replace(earlier, fields={**RECIPE, **changed}, guidance_scale=1.5, further=further_class_prompts)


VARIANTS: Mapping[str, Variant] = {
    **{_named(name): _variant(earlier) for name, earlier in ten_subjects.VARIANTS.items()},
    "places_again": replace(
        _variant(ten_subjects.VARIANTS["demo"]),
        fields={**RECIPE, "training.learning_rate": 1.001 * RECIPE["training.learning_rate"]},
    ),
}


def _asked_again(name: str) -> Ablation:
    """Return an ablation of the earlier recipe in this one."""
    earlier = ten_subjects.ABLATIONS[name]
    return replace(
        earlier,
        labels={_named(variant): label for variant, label in earlier.labels.items()},
        reference=_named(earlier.reference),
        paper={(metric, _named(variant)): direction for (metric, variant), direction in earlier.paper.items()},
        figures={_named(variant): figure for variant, figure in earlier.figures.items()},
        subjects=tuple(subject for subject in earlier.subjects if subject != CHOSEN_ON),
        seeds=(*earlier.seeds, 2) if len(earlier.seeds) > 1 else earlier.seeds,
    )


ABLATIONS: Mapping[str, Ablation] = {f"{name}_places": _asked_again(name) for name in ten_subjects.ABLATIONS}
