"""All variants and ablations by name."""

from collections.abc import Mapping

from benchmarks.quality import first_regimes, ten_subjects
from benchmarks.quality.variants import Ablation, Variant

VARIANTS: Mapping[str, Variant] = {**ten_subjects.VARIANTS, **first_regimes.VARIANTS}
ABLATIONS: Mapping[str, Ablation] = {**ten_subjects.ABLATIONS, **first_regimes.ABLATIONS}
