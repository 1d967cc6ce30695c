import pytest
import torch

from lowmem_db.errors import ConfigError
from lowmem_db.planning.cards import CARDS, CPU, card_of, find_card, pcie_seconds, seconds_per_step
from lowmem_db.planning.costs import CostRecorder
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
