"""All variants and ablations by name."""

from collections.abc import Mapping

from benchmarks.quality import first_regimes, kept_places, ten_subjects
from benchmarks.quality.variants import Ablation, Variant

VARIANTS: Mapping[str, Variant] = {**kept_places.VARIANTS, **ten_subjects.VARIANTS, **first_regimes.VARIANTS}
ABLATIONS: Mapping[str, Ablation] = {**kept_places.ABLATIONS, **ten_subjects.ABLATIONS, **first_regimes.ABLATIONS}
TODAY = tuple(kept_places.ABLATIONS)
"""The ablations on the base that is in the package now; rows of the others were measured on earlier ones."""
