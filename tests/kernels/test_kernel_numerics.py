import pytest
import torch
from lowmem_db_kernels import FrozenWeightsError, check_learning_rate, movable_fraction


@pytest.fixture
def weights():
    return 0.03 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("lr", "percent"), [(1e-6, 1.3), (2e-6, 2.6), (5e-6, 5.2)])
def test_few_rounded_bf16_weights_can_move(weights, lr, percent):
    assert movable_fraction(weights, lr, "bf16") == pytest.approx(percent / 100, abs=0.002)


@pytest.mark.parametrize("weight_format", ["fp32", "bf16_extra_bits", "bf16_stochastic"])
def test_the_other_formats_move_at_the_rates_of_dreambooth(weights, weight_format):
    assert check_learning_rate(weights, 1e-6, weight_format) > 0.9999


def test_a_rate_that_moves_nothing_is_refused(weights):
    with pytest.raises(FrozenWeightsError, match=r"at learning rate 2e-06 only 2\.\d% of the bf16 weights can move"):
        check_learning_rate(weights, 2e-6, "bf16")


def test_prediction_agrees_with_rounding(weights):
    stored = weights.to(torch.bfloat16).float()
    moved = ((stored + 2e-6).to(torch.bfloat16).float() != stored).float().mean()
    assert movable_fraction(stored, 2e-6, "bf16") == pytest.approx(moved.item(), abs=0.002)
