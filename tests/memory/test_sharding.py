"""The parts of a model that are put together at once, and how many bytes that takes."""

from functools import partial
from pathlib import Path

import pytest
from torch import nn

from lowmem_db.adaptation.layers import train_layers
from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import resolve
from lowmem_db.engine.build import prepare_modules
from lowmem_db.memory import sharding
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import find_model
from lowmem_db.models.loading import META


@pytest.fixture
def denoiser(tiny_model: Path, tiny_fields: dict[str, object]) -> Denoiser:
    config = resolve(load_config(None, [*tiny_fields.items(), ("training.train_text_encoder", True)]))
    model = find_model(str(tiny_model))
    return Denoiser(model.family, prepare_modules(config, model, META).modules)


def test_every_weight_belongs_to_the_innermost_unit(denoiser: Denoiser) -> None:
    names = {module: f"{of}.{name}" for of, root in denoiser.modules().items() for name, module in root.named_modules()}
    found = [names[unit] for unit in sharding.units(denoiser)]
    assert found[:3] == ["unet.down_blocks.0.resnets.0", "unet.down_blocks.0", "unet.down_blocks.1.attentions.0."
                         "transformer_blocks.0"]  # fmt: skip
    assert found[-1] == "unet."
    assert "text_encoder." in found
    assert len(set(found)) == len(found)


def test_bytes_that_pass_are_those_of_the_largest_layer_and_of_what_is_left(denoiser: Denoiser) -> None:
    bare = sharding.passing_bytes(denoiser, lambda parameter: True)
    assert bare == (0, 0)
    weights, gradients = sharding.passing_bytes(denoiser, lambda parameter: False)
    unet = denoiser.module
    largest = max(sum(each.nbytes for each in layer.parameters()) for layer in _layers(unet))
    assert 2 * largest < weights < 2 * largest + sum(each.nbytes for each in unet.parameters())
    assert gradients == weights + largest  # three copies of a layer's instead of two
    train_layers(denoiser.modules(), ["text_encoder.*mlp*"])
    assert sharding.passing_bytes(denoiser, lambda parameter: False)[1] < gradients


def test_process_holds_its_rows(denoiser: Denoiser) -> None:
    weights = dict(denoiser.module.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    sharding.shrink(denoiser, 2, partial(_is_vector))
    for name, weight in weights.items():
        rows = shapes[name][0] if len(shapes[name]) == 1 else -(-shapes[name][0] // 2)
        assert weight.shape == (rows, *shapes[name][1:])
        assert weight.untyped_storage().nbytes() == weight.nbytes


def _is_vector(parameter: nn.Parameter) -> bool:
    return parameter.dim() == 1


def _layers(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if type(module).__name__ in {"ResnetBlock2D", "BasicTransformerBlock"}]
