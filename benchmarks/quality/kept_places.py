"""Tables 3 and 4 on nine drawn subjects in the recipe of ``configs/demo.yaml``, with half of its steps.

Its class images keep places with nouns that have nothing of the subject, so that a higher learning rate does no harm.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.ten_subjects import ABLATIONS as BEFORE
from benchmarks.quality.ten_subjects import CONTEXTS, LIKE_DEMO, NAMES
from benchmarks.quality.variants import WITHOUT_PRIOR, Ablation, Variant
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


def _variant(fields: Mapping[str, Any] | None = None, **others: Any) -> Variant:
    return Variant(
        fields={**RECIPE, **(fields or {})},
        guidance_scale=1.5,
        contexts=CONTEXTS,
        further=further_class_prompts,
        **others,
    )


VARIANTS: Mapping[str, Variant] = {
    "places_untrained": _variant(trained=False),
    "places": _variant(),
    "places_without_prior": _variant(WITHOUT_PRIOR),
    "places_random_noun": _variant(noun="random"),
    "places_no_noun": _variant(noun="missing"),
    "places_again": _variant({"training.learning_rate": 1.001 * RECIPE["training.learning_rate"]}),
}


def _here(ablation: Ablation, **texts: str) -> Ablation:
    """Return an ablation of the earlier recipe in this one, with one seed."""

    def ours(name: str) -> str:
        return name.replace("demo", "places", 1)

    return replace(
        ablation,
        labels={ours(name): label for name, label in ablation.labels.items()},
        reference=ours(ablation.reference),
        paper={(metric, ours(name)): direction for (metric, name), direction in ablation.paper.items()},
        figures={ours(name): figure for name, figure in ablation.figures.items()},
        subjects=tuple(name for name in NAMES if name != CHOSEN_ON),
        seeds=(0,),
        **texts,
    )


ABLATIONS: Mapping[str, Ablation] = {
    "table_3_places": _here(BEFORE["table_3"], title="Table 3 again, base and recipe as they are now"),
    "table_4_places": _here(BEFORE["table_4"], title="Table 4 again, base and recipe as they are now"),
}
