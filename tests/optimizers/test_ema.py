"""The moving average of the weights."""

import copy

import pytest
import torch
from torch import nn

from lowmem_db.optimizers.ema import ExponentialMovingAverage


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(4).bfloat16())}


def move(parameters: dict[str, nn.Parameter], step: int) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)).to(parameter))


def test_average_follows_the_formula(parameters: dict[str, nn.Parameter]) -> None:
    ema = ExponentialMovingAverage(parameters, dict, decay=0.3)
    expected = {name: parameter.detach().double() for name, parameter in parameters.items()}
    for step in range(1, 6):
        move(parameters, step)
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13, then 0.3
        for name, parameter in parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
            assert ema.average[name].dtype == torch.float32
            torch.testing.assert_close(ema.average[name].double(), expected[name], atol=1e-6, rtol=1e-6)


def test_first_average_is_the_first_weights(parameters: dict[str, nn.Parameter]) -> None:
    ema = ExponentialMovingAverage(parameters, dict, decay=0.9)
    before = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
    move(parameters, 1)
    for name, weight in before.items():
        assert torch.equal(ema.average[name], weight)


@pytest.mark.parametrize("fails", [False, True])
def test_trained_weights_come_back_bit_for_bit(parameters: dict[str, nn.Parameter], fails: bool) -> None:
    ema = ExponentialMovingAverage(parameters, dict, decay=0.9)
    move(parameters, 1)
    ema.update(1)
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    average = {name: value.clone() for name, value in ema.average.items()}
    try:
        with ema.applied():
            for name, parameter in parameters.items():
                assert torch.equal(parameter.detach(), average[name].to(parameter.dtype))
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    for name, parameter in parameters.items():
        assert torch.equal(parameter.detach(), trained[name])
    assert torch.equal(ema.average["a"], average["a"])


def test_average_of_24_bit_weights_follows_the_bits_they_have_now() -> None:
    parameters = {"a": nn.Parameter(torch.ones(4).bfloat16()), "b": nn.Parameter(torch.ones(4).bfloat16())}
    bits = {"a": torch.zeros(4, dtype=torch.int8)}
    ema = ExponentialMovingAverage(parameters, lambda: bits, decay=0.5)
    bits = {"a": torch.full((4,), 64, dtype=torch.int8)}
    ema.update(100)
    assert torch.equal(ema.average["a"], torch.full((4,), 1 + 0.5 * 2**-9))
    assert torch.equal(ema.average["b"], torch.ones(4))


def test_average_is_applied_without_a_copy_where_its_type_is_asked_for(parameters: dict[str, nn.Parameter]) -> None:
    ema = ExponentialMovingAverage(parameters, dict, decay=0.9)
    before = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    with ema.applied(torch.float32):
        for name, parameter in parameters.items():
            assert parameter.data_ptr() == ema.average[name].data_ptr()
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == before


def test_restored_average_goes_on_bit_for_bit(parameters: dict[str, nn.Parameter]) -> None:
    ema = ExponentialMovingAverage(parameters, dict, decay=0.9)
    move(parameters, 1)
    ema.update(1)
    restored = ExponentialMovingAverage(parameters, dict, decay=0.9)
    restored.load_state_dict(copy.deepcopy(ema.state_dict()))
    move(parameters, 2)
    for each in (ema, restored):
        each.update(2)
    for name, average in ema.average.items():
        assert torch.equal(restored.average[name], average)
