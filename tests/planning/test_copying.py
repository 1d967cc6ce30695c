"""A copy for a trace is what ``copy.deepcopy`` makes, only sooner."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed
from lowmem_db.engine.build import Prepared, prepare_modules
from lowmem_db.models.finding import model_of
from lowmem_db.models.loading import META
from lowmem_db.planning.copying import copy_of


class Odd(nn.Module):
    """What modules can have: ties, buffers, hooks of their own, containers, and parts elsewhere than in fields."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta")
        self.second.weight = self.first.weight
        self.again = self.first
        self.register_buffer("table", torch.zeros(3, device="meta"))
        self.settings = {"rank": {"default": 4}}
        self.parts = [self.first]
        self.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, arguments: object) -> None:
        """Do nothing."""


def test_a_copy_shares_nothing_and_ties_stay() -> None:
    odd = Odd()
    made = copy_of(Prepared(modules={"odd": odd}, extra_bits={"w": torch.zeros(2, device="meta")}))
    assert made is not None
    copy = made.modules["odd"]
    assert isinstance(copy, Odd)
    assert copy.second.weight is copy.first.weight is not odd.first.weight
    assert copy.again is copy.first is copy.parts[0] is not odd.first
    assert copy.table is not odd.table
    assert copy.settings == odd.settings
    assert copy.settings["rank"] is not odd.settings["rank"]
    (hook,) = copy._forward_pre_hooks.values()
    assert hook.__self__ is copy
    copy.register_forward_hook(odd.hook)
    assert not odd._forward_hooks


@pytest.mark.parametrize("fields", [{}, {"lora.enabled": True}])
def test_a_copy_of_a_model_is_a_deep_copy(tiny_config: Config, fields: dict[str, object]) -> None:
    config = changed(tiny_config, fields)
    prepared = prepare_modules(config, model_of(config, weights=False), META)
    made, expected = copy_of(prepared), deepcopy(prepared)
    assert made is not None
    assert _layout(made) == _layout(expected)
    ours = {id(tensor) for module in prepared.modules.values() for tensor in _tensors(module)}
    assert not ours & {id(tensor) for module in made.modules.values() for tensor in _tensors(module)}


def _layout(prepared: Prepared) -> dict[str, list[object]]:
    return {
        name: [
            *((path, type(part), part.training, sorted(vars(part))) for path, part in module.named_modules()),
            *((path, type(p), p.shape, p.dtype, p.requires_grad) for path, p in module.named_parameters()),
            *((path, b.shape, b.dtype) for path, b in module.named_buffers()),
        ]
        for name, module in prepared.modules.items()
    }


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
