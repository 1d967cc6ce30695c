"""A spill is reported once, from the times of the steps and what the allocator has taken of a card."""

import pytest
import torch

from lowmem_db import environment
from lowmem_db.training import spill


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(spill, "warn", messages.append)
    return messages


def watch(seconds: list[float], device: str = "cuda") -> None:
    watching = spill.SpillWatch(torch.device(device))
    for of_step in seconds:
        watching.step({"seconds": of_step})


USUAL = [60.0, *[0.9, 1.0, 1.1] * 5]  # the first step compiles


@pytest.mark.parametrize(
    ("seconds", "share", "device", "is_said"),
    [
        ([*USUAL, *[4.0] * 20], 0.95, "cuda", True),
        ([*USUAL, *[4.0] * 20], 0.5, "cuda", False),  # slow for another reason
        ([*USUAL, *[4.0] * 20], 0.95, "cpu", False),
        ([*USUAL, *[2.5] * 20], 0.95, "cuda", False),
        ([*USUAL, *[4.0, 4.0, 4.0, 4.0, 1.0] * 4], 0.95, "cuda", False),  # samples of another program
        ([60.0, *[4.0] * 20], 0.95, "cuda", False),
    ],
)
def test_only_lasting_slowness_on_a_full_card_is_a_spill(
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: list[float],
    share: float,
    device: str,
    is_said: bool,
) -> None:
    monkeypatch.setattr(environment, "reserved_share", lambda device: share)
    watch(seconds, device)
    assert len(said) == is_said
    assert all("lower memory.budget" in message for message in said)
