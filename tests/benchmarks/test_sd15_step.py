"""A model of Stable Diffusion 1.5's size trains on a CPU; run by hand, about five minutes and 20 GiB."""

import math
from pathlib import Path

import pytest

from benchmarks.memory.sd15_step import GIB, measure_step


@pytest.mark.slow
def test_one_step_of_the_size_of_stable_diffusion_15_within_20_gib(tmp_path: Path) -> None:
    result = measure_step(tmp_path)
    assert math.isfinite(result["loss"])
    assert result["grad_norm"] > 0
    assert result["process_peak_bytes"] < 20 * GIB
