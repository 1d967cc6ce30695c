"""The bench on a CUDA device: what it must find there. Each test skips itself without one."""

import pytest
import torch

from lowmem_db.bench import bits, candidates, capped, kernels, memory, speed
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Row, Stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(torch.device("cuda"), quick=True)


def rows(stage: Stage, setting: Setting) -> dict[str, Row]:
    return {name: measure() for name, measure in stage.measurements(setting)}


def test_every_kernel_is_compiled_and_agrees_with_its_twin(setting: Setting) -> None:
    found = rows(kernels.STAGE, setting)
    assert found.pop("contract tests")["passed"] > 0
    assert {row["backend"] for row in found.values()} == {"triton"}


def test_two_identical_steps_end_with_the_same_bits(setting: Setting) -> None:
    assert all(row["same_bits"] for row in rows(bits.STAGE, setting).values())


def test_training_needs_what_the_planner_predicts(setting: Setting) -> None:
    for name, row in rows(memory.STAGE, setting).items():
        if "skipped" not in row:
            assert row["allocated_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.03), name
            assert row["reserved_bytes"] <= row["predicted_reserved_bytes"], name


def test_smaller_cards_hold_what_is_planned_for_them(setting: Setting) -> None:
    assert all("skipped" in row or row["is_capped"] for row in rows(capped.STAGE, setting).values())


@pytest.mark.parametrize("library", ["xformers", "bitsandbytes"])
def test_optional_libraries_have_their_rows(setting: Setting, library: str) -> None:
    pytest.importorskip(library)
    name, stage = {"xformers": ("xformers", candidates.STAGE), "bitsandbytes": ("adamw8bit", speed.STAGE)}[library]
    row = next(measure for each, measure in stage.measurements(setting) if each == name)()
    assert row["ratio"] > 0.0
