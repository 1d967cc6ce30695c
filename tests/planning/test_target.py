"""The budget of a device of this machine, and what the allocator may take of it, on a card that is not there."""

from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from lowmem_db_kernels import Choice
from lowmem_db_kernels.dispatch import choose

from lowmem_db import environment, memory_limits
from lowmem_db.config.loading import load_config
from lowmem_db.memory_limits import Limit
from lowmem_db.planning import cards
from lowmem_db.planning.allowance import allocator_bytes, allowance_bytes, reserved_bytes
from lowmem_db.planning.target import target_of_device
from tests.config.test_rules import NEEDED

GIB = 1 << 30
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def config_with(budget: str | None = None):
    fields = NEEDED | ({} if budget is None else {"memory.budget": budget})
    return load_config(None, list(fields.items()))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A card of 4 GiB, of which 3.4 GiB are free beside the context; what torch was told to stay below."""
    told: dict[str, float] = {}
    properties = SimpleNamespace(
        name="NVIDIA GeForce GTX 1650", total_memory=4 * GIB, major=7, minor=5, multi_processor_count=14
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", create_autospec(torch.cuda.mem_get_info, return_value=(int(3.4 * GIB), 4 * GIB))
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", create_autospec(torch.cuda.memory_reserved, return_value=0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cards, "choose", create_autospec(cards.choose, return_value=Choice("triton", "it is compiled")))
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda share, index: told.update({"share": share}), raising=False
    )
    return told


def test_context_is_counted_once_on_a_live_card(card: dict[str, float]) -> None:
    target = target_of_device(config_with(), CUDA)
    left_for_tensors = target.budget_bytes - allowance_bytes(0, target.card)
    assert 3.0 * GIB < left_for_tensors < 3.4 * GIB  # beside workspaces, and kernels that are loaded later
    assert target.budget_bytes <= 4 * GIB


def test_what_others_hold_of_the_card_is_said(card: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("other programs" in note for note in target_of_device(config_with(), CUDA).notes)
    monkeypatch.setattr(torch.cuda.mem_get_info, "return_value", (GIB, 4 * GIB))
    monkeypatch.setattr(torch.cuda.memory_reserved, "return_value", GIB // 2)
    said = target_of_device(config_with("3GiB"), CUDA).notes
    assert "other programs hold 2.1 GiB of NVIDIA GeForce GTX 1650; nvidia-smi lists them" in said
    assert "memory.budget: only 1.3 GiB of 3.0 GiB are free here" in said
    assert "the planner does not know NVIDIA GeForce GTX 1650: its times are those of an RTX 3060" in said


def test_card_knows_its_multiprocessors_and_who_computes_the_step(
    card: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = target_of_device(config_with(), CUDA).card
    assert (found.multiprocessors, found.eager_step) == (14, False)
    monkeypatch.setattr(cards, "choose", create_autospec(choose, return_value=Choice("eager", "there is no Triton")))
    assert target_of_device(config_with(), CUDA).card.eager_step


def test_given_budget_includes_the_context(card: dict[str, float]) -> None:
    assert target_of_device(config_with("3GiB"), CUDA).budget_bytes == 3 * GIB


@pytest.mark.parametrize("device", [CUDA, torch.device("cuda")], ids=str)  # as cuda:0, and as auto and cuda
def test_allocator_is_held_to_the_budget_and_let_go_afterwards(card: dict[str, float], device: torch.device) -> None:
    with environment.held_to(device, allocator_bytes(3 * GIB)):
        cap = card["share"] * 4 * GIB
        assert 2.5 * GIB < cap < 3 * GIB
    assert card["share"] == 1.0
    with environment.held_to(device, 9 * GIB):
        assert card["share"] == 1.0


def test_what_a_plan_promises_stays_below_the_cap(card: dict[str, float]) -> None:
    target = target_of_device(config_with("3GiB"), CUDA)
    tensors = next(
        size for size in range(3 * GIB, 0, -(1 << 20)) if size + allowance_bytes(size, target.card) <= 3 * GIB
    )
    reserved = reserved_bytes(tensors, target.card)
    assert reserved is not None
    assert reserved <= allocator_bytes(3 * GIB)


def test_cpu_is_not_capped(card: dict[str, float]) -> None:
    with environment.held_to(CPU, 1):
        assert not card


def test_budget_of_the_cpu_is_what_its_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "limits", lambda: [Limit(2 * GIB, GIB // 2, "the control group /docker/a")])
    target = target_of_device(config_with(), CPU)
    assert target.budget_bytes == 2 * GIB - GIB // 2
    assert target.notes == ("the control group /docker/a leaves this process 1.5 GiB of memory",)
    target = target_of_device(config_with("8GiB"), CPU)
    assert target.budget_bytes == 2 * GIB - GIB // 2
    assert "memory.budget: only 1.5 GiB of 8.0 GiB are free here" in target.notes
    assert target_of_device(config_with("1GiB"), CPU).budget_bytes == GIB
