"""The model of the caching allocator, and that what a plan sets aside covers what it says of real strategies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_db import nvidia
from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import resolve
from lowmem_db.models.finding import model_of
from lowmem_db.planning.allowance import allowance_bytes, fragmentation_bytes, reserved_bytes, workspace_bytes
from lowmem_db.planning.caching_allocator import CachingAllocator
from lowmem_db.planning.caching_allocator import reserved_bytes as reserved_by_model
from lowmem_db.planning.cards import CPU, find_card
from lowmem_db.planning.costs import Attention
from lowmem_db.planning.phases import TracedRun, trace_allocations

MIB = 1 << 20
CONFIGS = Path(__file__).parents[2] / "configs"
CARD = find_card("rtx 3060")
QUICK = ("sd15_full_4gb", {})
STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("sd15_full_4gb", {}),
    ("sd15_full_8gb", {}),
    ("sd15_full_8gb", {"memory.checkpointing": "none"}),
    ("sd15_lora_4gb", {}),
    ("sdxl_full_8gb", {}),
    ("sdxl_full_12gb", {}),
]


@pytest.mark.parametrize(
    ("name", "fields"),
    [case if case == QUICK else pytest.param(*case, marks=pytest.mark.long) for case in STRATEGIES],
)
def test_what_is_set_aside_covers_what_is_reserved(
    name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(load_config(CONFIGS / f"{name}.yaml", list(fields.items())))
    events, peak = trace_allocations(TracedRun(config=config, model=model_of(config, weights=False), card=CARD))
    for expandable in (True, False):
        monkeypatch.setattr(nvidia, "has_expandable_segments", lambda expandable=expandable: expandable)
        assert peak < reserved_by_model(events, expandable=expandable) <= peak + fragmentation_bytes(peak)


def test_three_figures_of_a_plan_stand_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = 1000 * MIB
    monkeypatch.setattr(nvidia, "has_expandable_segments", lambda: True)
    assert (reserved_bytes(peak, CARD), allowance_bytes(peak, CARD)) == (1200 * MIB, 650 * MIB)
    monkeypatch.setattr(nvidia, "has_expandable_segments", lambda: False)
    assert (reserved_bytes(peak, CARD), allowance_bytes(peak, CARD)) == (1250 * MIB, 700 * MIB)
    assert (reserved_bytes(peak, CPU), allowance_bytes(peak, CPU)) == (None, 690 * MIB)


@pytest.mark.parametrize(
    ("card", "attention", "copies_bytes"),
    [  # ceil(multiprocessors / heads) copies of heads x queries x channels in fp32, of rounded sizes
        ("rtx 3060", Attention(16, 4096, 40, torch.bfloat16), 2 * 16 * 4096 * 64 * 4),
        ("rtx 4090", Attention(16, 4096, 40, torch.bfloat16), 8 * 16 * 4096 * 64 * 4),
        ("rtx 4090", Attention(8, 9216, 40, torch.float16), 16 * 8 * 9216 * 64 * 4),
        ("rtx 4090", Attention(512, 4096, 64, torch.float16), 512 * 4096 * 64 * 4),
        ("h100", Attention(20, 4000, 72, torch.bfloat16), 7 * 20 * 4096 * 96 * 4),
        ("t4", Attention(64, 16384, 40, torch.float16), 64 * 16384 * 64 * 4),
        ("rtx 4090", Attention(8, 9216, 40, torch.float32), 0),
    ],
)  # fmt: skip
def test_workspace_of_attention_grows_with_heads_tokens_and_card(
    card: str, attention: Attention, copies_bytes: int
) -> None:
    small = Attention(16, 64, 64, torch.bfloat16)
    assert workspace_bytes(find_card(card), [attention, small]) == max(150 * MIB, 32 * MIB + copies_bytes)
    more = allowance_bytes(0, find_card(card), [attention]) - allowance_bytes(0, find_card(card))
    assert more == max(0, copies_bytes - 118 * MIB)
    assert reserved_bytes(0, find_card(card), [attention]) == workspace_bytes(find_card(card), [attention])


@pytest.mark.parametrize(
    ("size", "fixed", "expandable"),
    [
        (1, 2 * MIB, 2 * MIB),
        (MIB + 1, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 20 * MIB, 20 * MIB),
        (11 * MIB, 12 * MIB, 20 * MIB),
        (41 * MIB, 42 * MIB, 60 * MIB),
    ],
)
def test_segment_of_one_block(size: int, fixed: int, expandable: int) -> None:
    assert reserved_by_model([("a", size)], expandable=False) == fixed
    assert reserved_by_model([("a", size)], expandable=True) == expandable


def test_freed_neighbours_become_one_block() -> None:
    events = [("a", 8 * MIB), ("b", 8 * MIB), ("c", 4 * MIB), ("a", 0), ("b", 0), ("d", 16 * MIB)]
    assert reserved_by_model(events, expandable=False) == 20 * MIB


def test_small_rest_of_a_large_block_is_lost_where_segments_are_fixed() -> None:
    events = [("a", 20 * MIB), ("a", 0), ("b", 19 * MIB), ("c", MIB)]  # c is small: it has a pool of its own
    assert reserved_by_model(events, expandable=False) == 22 * MIB
    events = [*events, ("d", 2 * MIB)]
    assert reserved_by_model(events, expandable=False) == 42 * MIB


def test_segment_that_grows_uses_what_is_free_at_its_end() -> None:
    events = [("a", 20 * MIB), ("b", 20 * MIB), ("b", 0), ("c", 40 * MIB)]
    assert reserved_by_model(events, expandable=True) == 60 * MIB
    assert reserved_by_model(events, expandable=False) == 80 * MIB


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30 * MIB)), max_size=60), st.booleans())
def test_blocks_never_overlap_and_everything_can_be_had_again(
    requests: list[tuple[int, int]], expandable: bool
) -> None:
    allocator = CachingAllocator(expandable=expandable)
    held: dict[int, int] = {}
    for name, size in requests:
        if name in held:
            allocator.free(name)
            del held[name]
        else:
            allocator.allocate(name, size)
            held[name] = size
        assert sum(held.values()) <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
    for name in held:
        allocator.free(name)
    free = [block for pool in (allocator._small, allocator._large) for _, _, block in pool.free]
    assert sum(block.num_bytes for block in free) == allocator.reserved_bytes
    assert all(block.before is None and block.after is None for block in free)
