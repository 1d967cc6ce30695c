"""Convolutions in channels_last: the same model in another layout, with and without fused layers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lowmem_db.bench.steps import Steps, first_difference
from lowmem_db.bench.strategies import Strategy
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed, describe, resolve
from lowmem_db.memory import channels_last
from lowmem_db.models.finding import model_of
from lowmem_db.planning.cards import CPU as CPU_CARD
from lowmem_db.planning.measured import measure_train
from lowmem_db.planning.phases import TracedRun, trace_train

CPU = torch.device("cpu")
ON = {"memory.channels_last": True}
IN_BACKWARD = {
    "optimizer.name": "adamw8bit",
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "memory.checkpointing": "segments",
    "training.clipping": "update_rms",
}


@pytest.fixture
def plain(tiny_config: Config) -> Config:
    return resolve(changed(tiny_config, {"optimizer.name": "adamw8bit"}))


def steps(config: Config, number: int) -> Steps:
    torch.manual_seed(0)
    made = Steps(Strategy("test", config, model_of(config)), CPU)
    for _ in range(number):
        made()
    return made


def weights(made: Steps) -> dict[str, Tensor]:
    return {name: each.detach().float() for name, each in made.denoiser.module.named_parameters()}


def convolutions(module: nn.Module) -> Iterator[Tensor]:
    yield from (each.weight for each in module.modules() if isinstance(each, nn.Conv2d) and each.kernel_size != (1, 1))


def test_layout_changes_and_comes_back() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 4, 1))
    before = {name: each.clone() for name, each in module.state_dict().items()}
    undo = channels_last.apply(module)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not module[0].weight.is_contiguous()
    assert all(torch.equal(before[name], each) for name, each in module.state_dict().items())
    undo()
    assert all(each.is_contiguous() for each in module.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_agree_with_those_of_the_other_layout(plain: Config, fused: bool) -> None:
    config = changed(plain, IN_BACKWARD | {"memory.fused_layers": fused})
    there, here = steps(config, 2), steps(changed(config, ON), 2)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in convolutions(here.denoiser.module))
    for (name, ours), other in zip(weights(here).items(), weights(there).values(), strict=True):
        assert torch.allclose(ours, other, rtol=0.02, atol=5e-5), name  # two steps of 1e-5 at most


def test_feature_maps_stay_in_it_inside_residual_blocks(plain: Config) -> None:
    made, seen = steps(changed(plain, ON | {"memory.fused_layers": True}), 0), []
    for name, block in made.denoiser.module.named_modules():
        if name.endswith(("conv1", "norm2", "conv2")) and ".resnets." in name:
            block.register_forward_hook(
                lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    made()
    assert len(seen) > 4
    assert all(seen)


def test_resumed_step_ends_with_the_same_bits(plain: Config) -> None:
    made = steps(changed(plain, IN_BACKWARD | ON), 1)
    saved = made.state()
    made()
    once = made.state()
    other = steps(changed(plain, IN_BACKWARD | ON), 0)
    other.restore(saved)
    other()
    assert first_difference(once, other.state()) is None


def test_plan_counts_it(plain: Config) -> None:
    config = changed(plain, IN_BACKWARD | ON | {"memory.fused_layers": True})
    assert "channels_last" in describe(config)
    model = model_of(config)
    predicted = trace_train(TracedRun(config=config, model=model, card=CPU_CARD)).peak.total
    assert predicted == pytest.approx(measure_train(config, model, CPU, num_steps=2).tensor_bytes, rel=0.02)
