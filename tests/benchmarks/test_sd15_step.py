"""A model of Stable Diffusion 1.5's size trains on a CPU; run by hand, some minutes and up to 20 GiB."""

import math
from pathlib import Path

import pytest

from benchmarks.memory.sd15_step import GIB, measure_steps


@pytest.mark.slow
@pytest.mark.parametrize(("job", "limit_gib"), [("plain", 20), ("engine", 6.9)])
def test_steps_of_the_size_of_stable_diffusion_15_stay_within(job: str, limit_gib: float, tmp_path: Path) -> None:
    result = measure_steps(tmp_path, job)
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert min(result["grad_norms"]) > 0
    assert result["process_peak_bytes"] < limit_gib * GIB
