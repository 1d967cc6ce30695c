"""Memory of the host beside a card: planned, compared with what is free, and refused like the card's."""

from dataclasses import replace

import pytest

from lowmem_db import environment, nvidia
from lowmem_db.errors import BudgetError
from lowmem_db.planning.cards import ASSUMED, CPU
from lowmem_db.planning.output import as_json
from lowmem_db.planning.plan import Plan, Planner, plan
from lowmem_db.planning.target import Target
from lowmem_db.records import MemoryParts, PhaseMemory
from tests.planning.conftest import make_config, make_run

GIB, MIB = 1 << 30, 1 << 20


@pytest.fixture(scope="module")
def tiny(tiny_model) -> dict[str, object]:
    return {
        "model__base": str(tiny_model), "data__resolution": 32, "optimizer__name": "adamw8bit",
        "prior__enabled": False, "memory__weights": "bf16_extra_bits", "memory__optimizer_in_backward": True,
        "memory__stream_optimizer_state": True, "memory__checkpointing": "segments",
        "memory__offload_checkpoints": False, "memory__fused_layers": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def planner(tiny) -> Planner:
    return Planner(make_run(make_config(**tiny)))


@pytest.fixture(scope="module")
def streamed(planner: Planner) -> Plan:
    return planner.plan(GIB)


def test_what_a_card_needs_of_the_host_is_planned(streamed: Plan) -> None:
    phase = max(streamed.phases, key=lambda each: each.host_bytes)
    assert streamed.host_peak_bytes >= phase.host_bytes + 256 * MIB
    assert as_json(streamed)["host_peak_bytes"] == streamed.host_peak_bytes


def test_strategy_that_does_not_fit_the_host_is_refused(planner: Planner, streamed: Plan) -> None:
    assert planner.plan(GIB, host_bytes=streamed.host_peak_bytes).config == streamed.config
    refused = r"memory of the host: 0\.\d GiB are free, .* raise the limit of the container"
    for too_small in (streamed.host_peak_bytes - 1, 1):
        with pytest.raises(BudgetError, match=refused):
            planner.plan(GIB, host_bytes=too_small)


def test_windows_lets_programs_pin_half_of_the_memory(
    planner: Planner, streamed: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = max(phase.host_bytes for phase in streamed.phases)
    monkeypatch.setattr(nvidia, "is_in_wsl", lambda: True)
    monkeypatch.setattr(environment, "total_host_bytes", lambda: 2 * pinned)
    assert planner.plan(GIB, host_bytes=9 * GIB).config == streamed.config
    monkeypatch.setattr(environment, "total_host_bytes", lambda: 2 * pinned - 2)
    with pytest.raises(BudgetError, match=r"memory of the host: .*; Windows lets programs pin 0\.0 GiB here"):
        planner.plan(GIB, host_bytes=9 * GIB)
    monkeypatch.setattr(nvidia, "is_in_wsl", lambda: False)
    assert planner.plan(GIB, host_bytes=9 * GIB).config == streamed.config


def test_target_without_memory_of_its_own_host_is_not_limited_by_it(tiny) -> None:
    config = make_config(**tiny)
    assert plan(config, Target(card=ASSUMED, budget_bytes=GIB)).host_peak_bytes > 0
    with pytest.raises(BudgetError, match=r"memory of the host"):
        plan(config, Target(card=ASSUMED, budget_bytes=GIB, host_bytes=1 * MIB))
    assert plan(config, Target(card=CPU, budget_bytes=8 * GIB)).host_peak_bytes == 0


def test_container_is_named_where_it_is_too_small(tiny) -> None:
    target = Target(
        card=CPU, budget_bytes=100 * MIB, notes=("the control group /docker/a leaves this process 0.1 GiB",)
    )
    with pytest.raises(BudgetError, match=r"memory\.budget: 0\.1 GiB .*\(the control group /docker/a leaves"):
        plan(make_config(**tiny), target)


@pytest.mark.parametrize(
    ("base", "name", "factor"), [(None, "encode_images", 1), ("nf4", "train", 4), ("int8", "class_images", 2)]
)
def test_weights_are_on_the_host_before_they_are_packed(
    planner: Planner, streamed: Plan, base, name: str, factor: int
) -> None:
    strategy = streamed.config
    strategy = strategy.model_copy(
        update={
            "lora": strategy.lora.model_copy(update={"base_weights": base}),
            "memory": strategy.memory.model_copy(update={"weights": "fp32"}),
        }
    )
    phase = PhaseMemory(name=name, parts=MemoryParts(weights=1000 * MIB))
    assert planner.needs.host_peak(strategy, [phase]) == factor * 1000 * MIB + 256 * MIB
    assert planner.needs.host_peak(strategy, [replace(phase, host_bytes=9 * GIB)]) == 9 * GIB + 256 * MIB
