import pytest
import torch
from torch import nn

from benchmarks.quality.stored_weights import keep_weights_as
from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import plain_strategy
from lowmem_db.optimizers.build import build_optimizer
from lowmem_db.optimizers.handle import OptimizerHandle


def optimizer_of(module: nn.Module) -> OptimizerHandle:
    config = load_config(
        None,
        [
            ("model.base", "demo"),
            ("output_dir", "runs/x"),
            ("subject.instance_dir", "."),
            ("subject.instance_prompt", "a sks dog"),
            ("prior.enabled", False),
        ],
    )
    return build_optimizer(config, plain_strategy(config), {"unet": module}, torch.device("cpu"))


def trained(kind: str, *, steps: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(96, 64, bias=False)
    start = module.weight.detach().clone()
    optimizer = optimizer_of(module)
    keep_weights_as(kind, optimizer, seed=0)  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.set_learning_rates({"unet": rate})
        optimizer.backward(module.weight.sum())
        optimizer.step()
    return start, module.weight.detach()


@pytest.mark.parametrize("kind", ["bf16_extra_bits", "bf16_stochastic"])
def test_the_model_sees_bf16_values_that_move_as_fp32_ones_do(kind: str) -> None:
    start, plain = trained("fp32", steps=40, rate=1e-5)
    _, weight = trained(kind, steps=40, rate=1e-5)
    assert torch.equal(weight, weight.bfloat16().float())
    assert not torch.equal(plain, plain.bfloat16().float())
    moved, expected = (weight - start).mean(), (plain - start).mean()
    assert expected < -3.9e-4
    assert abs(moved / expected - 1) < 0.05


def test_fp32_is_left_alone() -> None:
    module = nn.Linear(4, 4, bias=False)
    optimizer = optimizer_of(module)
    step = optimizer.step
    keep_weights_as("fp32", optimizer, seed=0)
    assert optimizer.step == step
