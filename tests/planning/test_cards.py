import numpy as np
import pytest
import torch
from lowmem_db_kernels import geglu

from lowmem_db.errors import ConfigError
from lowmem_db.planning.cards import (
    CARDS,
    CPU,
    Crossing,
    card_of,
    find_card,
    is_known,
    known_name,
    pcie_seconds,
    seconds_per_step,
)
from lowmem_db.planning.costs import CostRecorder, Costs
from lowmem_db.planning.tracker import AllocationTracker


@pytest.mark.parametrize("name", ["rtx 3060", "RTX3060", "3060", "NVIDIA GeForce RTX 3060", "geforce rtx-3060"])
def test_card_is_found_whatever_its_spelling(name):
    assert find_card(name).name == "RTX 3060"


def test_memory_behind_the_name_counts():
    assert find_card("rtx 3060 8gb").memory_gib == 8
    assert find_card("4060 ti 16GB").memory_gib == 16


@pytest.mark.parametrize(("typo", "near"), [("rtx 3600", "RTX 3060"), ("rxt 4090", "RTX 4090"), ("A10", "A100")])
def test_typo_names_the_near_ones(typo, near):
    with pytest.raises(ConfigError, match=f"did you mean.*{near}"):
        find_card(typo)


@pytest.mark.parametrize("name", ["RTX 4090 Laptop", "RTX 2080 Super", "rtx 3080 ti laptop gpu", "A100 MIG 1g.5gb"])
def test_card_that_only_begins_alike_is_asked_about(name):
    with pytest.raises(ConfigError, match=r"is unknown; .*give --budget"):
        find_card(name)


@pytest.mark.parametrize("name", ["rtx 3060 0GB", "RTX 4060 Ti 00gb"])
def test_card_without_memory_is_refused_at_once(name):
    with pytest.raises(ConfigError, match="has no memory"):
        find_card(name)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti"),
        ("NVIDIA GeForce RTX 3080", "RTX 3080"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A1000", None),
        ("NVIDIA L40S", None),
        ("NVIDIA T400 4GB", None),
    ],
)  # fmt: skip
def test_name_of_a_driver_is_known_exactly_or_not_at_all(name, known):
    assert known_name(name) == (known or name)
    assert is_known(name) == (known is not None)


def test_unknown_card_names_all():
    with pytest.raises(ConfigError, match=r"--gpu: 'banana' is unknown; Allowed: GTX 1660 Ti, .*T4.*--budget"):
        find_card("banana")


def test_names_are_unique_and_figures_are_sane():
    assert len({card.name for card in CARDS}) == len(CARDS) >= 25
    for card in CARDS:
        assert find_card(card.name) == card
        assert card.tflops > card.fp32_tflops > 0
        assert card.usable_bytes < card.memory_gib * 2**30
    assert [card.name for card in CARDS if not card.has_bf16] == [
        "GTX 1660 Ti", "RTX 2060", "RTX 2070", "RTX 2080", "RTX 2080 Ti", "T4", "V100",
    ]  # fmt: skip


def test_card_of_this_machine_has_its_own_memory():
    card = card_of("NVIDIA GeForce RTX 4060 Ti", total_bytes=16 << 30, capability=(8, 9))
    assert card.usable_bytes == pytest.approx(16 << 30)
    assert (card.bandwidth, card.pcie_lanes) == (288, 8)
    unknown = card_of("NVIDIA Future 1", total_bytes=1 << 30, capability=(13, 0))
    assert (unknown.name, unknown.capability) == ("NVIDIA Future 1", (13, 0))


def test_matrix_product_takes_its_operations():
    costs = CostRecorder()
    with AllocationTracker(costs=costs).tracking():
        torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta") @ torch.empty(
            4096, 4096, dtype=torch.bfloat16, device="meta"
        )
    found = costs.costs()
    assert found.flops.sum() == 2 * 4096**3
    assert found.moved_bytes.sum() == 3 * 4096**2 * 2
    card = find_card("rtx 3060")
    assert seconds_per_step(found, card) == pytest.approx(2 * 4096**3 / (25.6e12 * 0.5))
    assert seconds_per_step(found, find_card("rtx 4090")) < seconds_per_step(found, card)


def test_bytes_over_pcie_take_longer_on_fewer_lanes():
    fast, slow = pcie_seconds(1 << 30, find_card("rtx 3060")), pcie_seconds(1 << 30, find_card("rtx 3050"))
    assert slow == pytest.approx(2 * fast)
    assert fast == pytest.approx((1 << 30) / (0.985e9 * 2 * 16 * 0.8))
    assert pcie_seconds(1 << 30, CPU) > 0


def costs_of(num_operators, *, moved_bytes=0, num_kernels=0, num_backward=0):
    numbers = np.arange(num_operators)
    return Costs(
        flops=np.zeros(num_operators, dtype=np.int64),
        moved_bytes=np.full(num_operators, moved_bytes),
        compute_type=np.zeros(num_operators, dtype=np.int64),
        is_kernel=(numbers < num_kernels).astype(np.int64),
        in_backward=(numbers >= num_operators - num_backward).astype(np.int64),
        block=np.full(num_operators, -1),
    )


def test_fast_card_waits_for_the_host():
    many, h100 = costs_of(5000), find_card("H100")
    assert seconds_per_step(many, h100) == pytest.approx(5000 * 8e-6)
    assert seconds_per_step(costs_of(5000, num_kernels=700), h100) == pytest.approx(4300 * 8e-6 + 700 * 25e-6)
    large = costs_of(5000, moved_bytes=100_000_000)
    assert seconds_per_step(large, h100) == pytest.approx(5000 * 1e8 / (3350e9 * 0.75))
    assert seconds_per_step(costs_of(5000), CPU) == pytest.approx(5000 * 5e-6)


def test_states_cross_beside_the_backward_pass_alone():
    card, size = find_card("rtx 3060"), 270_000_000  # a millisecond each
    half = costs_of(100, moved_bytes=size, num_backward=50)
    alone, copied = seconds_per_step(half, card), pcie_seconds(3 << 30, card)
    assert alone == pytest.approx(0.1)
    assert seconds_per_step(half, card, crossing=Crossing(backward=1 << 20, back=1 << 20)) == alone
    assert copied > 0.05
    assert seconds_per_step(half, card, crossing=Crossing(back=3 << 30)) == pytest.approx(0.05 + copied)


def test_what_runs_again_counts_on_the_card_and_on_the_host():
    again, card = np.array([1.0] * 25 + [0.0] * 75), find_card("rtx 3060")
    assert seconds_per_step(costs_of(100, moved_bytes=270_000_000), card, again=again) == pytest.approx(0.125)
    assert seconds_per_step(costs_of(100), card, again=again) == pytest.approx(125 * 8e-6)


def test_backward_pass_and_kernels_are_told_apart():
    costs = CostRecorder()
    with AllocationTracker(costs=costs).tracking():
        weight = torch.ones(8, 8, device="meta", requires_grad=True)
        geglu(weight).sum().backward()
    found = costs.costs()
    assert found.is_kernel.sum() == 2
    assert found.is_kernel[found.in_backward == 1].sum() == 1
    assert 0 < found.in_backward.sum() < len(found.in_backward)
