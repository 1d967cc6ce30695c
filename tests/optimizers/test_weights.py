"""Kinds of weights."""

import pytest
import torch
from torch import nn

from lowmem_db.optimizers import weights

BF16_STEP = 2.0**-8  # between 1 and 2, half the distance of two bf16


def modules(memory_format: torch.memory_format = torch.contiguous_format) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": nn.Sequential(nn.Conv2d(3, 50, 6), nn.Linear(7, 3)).to(memory_format=memory_format)}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_24_bit_weights_are_the_fp32_weights_but_for_their_last_bits(
    memory_format: torch.memory_format, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    trained, before = modules(memory_format), modules()["unet"]
    extra_bits = weights.apply(trained, "bf16_extra_bits")
    assert extra_bits.keys() == weights.named_parameters(trained).keys()
    for parameter, fp32 in zip(trained["unet"].parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(parameter.float(), fp32, rtol=2**-8, atol=0)
        assert parameter.ne(fp32.bfloat16()).float().mean() < 0.02  # ties alone may go to the other neighbour
    weights.undo(trained, extra_bits)
    for parameter, fp32 in zip(trained["unet"].parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(parameter, fp32, rtol=2**-16, atol=0)
        assert not torch.equal(parameter, fp32.bfloat16().float())


@pytest.mark.parametrize(("kind", "dtype"), [("fp32", torch.float32), ("bf16_stochastic", torch.bfloat16)])
def test_other_kinds_have_no_extra_bits(kind: str, dtype: torch.dtype) -> None:
    trained, before = modules(), modules()["unet"]
    assert weights.apply(trained, kind) == {}
    for parameter, fp32 in zip(trained["unet"].parameters(), before.parameters(), strict=True):
        assert parameter.dtype == dtype
        assert torch.equal(parameter, fp32.to(dtype))


def test_a_weight_that_is_rounded_at_random_keeps_its_mean_and_depends_on_the_step_alone() -> None:
    found = []
    for step in (1, 1, 2):
        weight = torch.ones(40_000, dtype=torch.bfloat16)
        with weights.stepped_in_fp32(weight, None, rounding_seed=7, step=torch.tensor(step)) as whole:
            whole.add_(0.25 * BF16_STEP)
        found.append(weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert set(found[0].tolist()) == {1.0, 1.0 + 2 * BF16_STEP}
    # 1/8 of the weights move; the standard deviation of that share is 0.0017
    assert found[0].float().gt(1.0).float().mean().item() == pytest.approx(1 / 8, abs=0.01)
