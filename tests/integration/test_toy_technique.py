"""A memory technique is added from this file alone: it is planned, trained with and resumed.

It keeps activations in bf16 between the forward and the backward pass.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lowmem_db.config.loading import load_config, read_yaml
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import describe, resolve, switch, values_of
from lowmem_db.errors import ConfigError
from lowmem_db.memory import techniques
from lowmem_db.memory.techniques import Technique
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import model_of
from lowmem_db.planning.cards import CPU
from lowmem_db.planning.phases import TracedRun
from lowmem_db.planning.plan import Plan, Planner
from lowmem_db.run.run import train

FIELD = switch(
    "memory.techniques.half_activations",
    "activations kept in bf16",
    choices=lambda config, where: (False, True),
    overhead=0.1,
    traced=("train",),
)


def apply(denoiser: Denoiser, config: Config, device: torch.device) -> Callable[[], None]:
    if not FIELD.of(config):
        return lambda: None
    module, forward = denoiser.module, denoiser.module.forward
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        is_activation = tensor.dtype == torch.float32 and tensor.untyped_storage()._cdata not in weights
        return tensor.bfloat16() if is_activation else tensor

    def forward_in_halves(*args: object, **kwargs: object) -> object:
        with saved_tensors_hooks(pack, lambda kept: kept.float()):
            return forward(*args, **kwargs)

    module.forward = forward_in_halves
    return lambda: delattr(module, "forward")


@pytest.fixture
def half_activations() -> Iterator[None]:
    undo = techniques.register(FIELD, Technique(fields=(FIELD.path,), apply=apply))
    yield
    undo()


def final_weights(config: Config) -> dict[str, bytes]:
    folder = config.output_dir / "final"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.fixture
def fields(tiny_fields: dict[str, object]) -> dict[str, object]:
    return tiny_fields | {"checkpointing.every": 2, "prior.enabled": False, "training.train_batch_size": 4}


def with_fields(fields: dict[str, object], **changes: object) -> Config:
    return load_config(None, list((fields | changes).items()))


@pytest.mark.usefixtures("half_activations")
def test_it_is_planned(fields: dict[str, object]) -> None:
    given = {"memory.checkpointing": "none", "memory.optimizer_in_backward": False}
    config = with_fields(fields | given)
    planner = Planner(TracedRun(config=config, model=model_of(config), card=CPU))

    def train_bytes(plan: Plan) -> int:
        return next(phase.parts.activations for phase in plan.phases if phase.name == "train")

    roomy = planner.plan(1 << 40)
    assert FIELD.of(roomy.config) is False
    tight = planner.plan(roomy.peak_bytes - 1)
    assert FIELD.of(tight.config) is True
    assert train_bytes(tight) < 0.8 * train_bytes(roomy)
    assert tight.seconds_per_step == pytest.approx(1.1 * roomy.seconds_per_step)
    assert describe(tight.config).endswith(", activations kept in bf16")
    assert values_of(tight.config)["half_activations"] is True
    assert planner.smallest().num_bytes <= tight.peak_bytes


@pytest.mark.usefixtures("half_activations")
def test_it_trains_and_goes_on_bit_for_bit(fields: dict[str, object], tmp_path: Path) -> None:
    on = {"memory.techniques.half_activations": True}
    straight = with_fields(fields | on, output_dir=str(tmp_path / "straight"))
    train(straight)
    plain = with_fields(fields, output_dir=str(tmp_path / "plain"))
    train(plain)
    assert final_weights(straight) != final_weights(plain), "it was never applied"
    half = with_fields(fields | on, output_dir=str(tmp_path / "half"), **{"training.max_train_steps": 2})
    train(half)
    resumed = with_fields(fields, output_dir=str(tmp_path / "half"))  # what is left open is taken over from the run
    train(resumed, resume=True)
    assert final_weights(resumed) == final_weights(straight)
    assert FIELD.of(read_yaml(tmp_path / "half" / "config.yaml")) is True


def test_it_is_gone_when_it_is_taken_back(fields: dict[str, object]) -> None:
    undo = techniques.register(FIELD, Technique(fields=(FIELD.path,), apply=apply))
    with pytest.raises(ValueError, match=r"half_activations: allowed: .* not yet registered"):
        techniques.register(FIELD, Technique(fields=(FIELD.path,), apply=apply))
    undo()
    assert resolve(with_fields(fields)).memory.techniques == {}
    with pytest.raises(ConfigError, match=r"memory\.techniques: .*half_activations.* that is not registered"):
        with_fields(fields, **{"memory.techniques.half_activations": True})
    assert with_fields(fields, **{"memory.techniques.half_activations": False})
