"""A LoRA step at the size of Stable Diffusion XL on a CPU; by hand, some minutes and about 12 GiB."""

import math
from typing import Any

import pytest

from benchmarks.memory.sdxl_lora_step import GIB, measure_step


def check(result: dict[str, Any]) -> None:
    assert math.isfinite(result["loss"])
    assert result["grad_norm"] > 0
    assert 0 < result["trained_parameters"]["unet"] < 0.1 * result["parameters"]


@pytest.mark.long
def test_step_of_the_demo_base() -> None:
    result = measure_step("model.base=demo", "data.resolution=64")
    check(result)
    assert result["process_peak_bytes"] > result["predicted_train_bytes"]


@pytest.mark.slow
def test_step_of_the_size_of_sdxl_stays_within_22_gib() -> None:
    result = measure_step()
    check(result)
    assert result["parameters"] - result["trained_parameters"]["unet"] == 2_567_463_684
    assert result["process_peak_bytes"] < 22 * GIB
