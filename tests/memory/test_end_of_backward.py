"""FSDP2's hooks learn when the backward pass of a module has ended, and its gradients keep their bits."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.memory import end_of_backward


class _Ending(torch.autograd.Function):
    """What FSDP2 puts in front of the inputs of a module."""

    @staticmethod
    def forward(ctx: Any, told: list[str], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.told = told
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.told.append("end")
        return (None, *gradients)


class _Block(nn.Module):
    """A block that uses its input twice, and returns what it has made twice, as one with a skip connection does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = x + self.second(self.first(x).tanh())
        return y, {"skip": y}


@dataclass
class _Model:
    blocks: list[_Block] = field(default_factory=lambda: [_Block() for _ in range(3)])
    told: list[list[str]] = field(default_factory=lambda: [[] for _ in range(3)])

    def gradients(self) -> list[Tensor]:
        x = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) * 100)
        skips, y = [], x * 1.1
        for block in self.blocks:
            y, others = block(y)
            skips.append(others["skip"])
        for skip in skips:
            y = y + (skip * 0.37).sin()
        y.square().sum().backward()
        weights = [x, *(weight for block in self.blocks for weight in block.parameters())]
        return [weight.grad for weight in weights if weight.grad is not None]


def _hooked(*, applied: bool) -> _Model:
    torch.manual_seed(0)
    model = _Model()
    for block, told in zip(model.blocks, model.told, strict=True):
        for name, weight in block.named_parameters():
            weight.register_post_accumulate_grad_hook(lambda _, name=name, told=told: told.append(name))
        block.register_forward_pre_hook(partial(_with_ending, told))
        if applied:
            end_of_backward.apply(block, torch.device("cpu"))
    return model


def _with_ending(told: list[str], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    trained = [index for index, each in enumerate(args) if isinstance(each, Tensor) and each.requires_grad]
    replaced = _Ending.apply(told, *(args[index] for index in trained)) if trained else ()
    return tuple(replaced[trained.index(index)] if index in trained else each for index, each in enumerate(args))


def _same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_gradients_of_skip_connections_keep_their_bits() -> None:
    torch.manual_seed(0)
    expected = _Model().gradients()
    assert _same(_hooked(applied=True).gradients(), expected)
    assert not _same(_hooked(applied=False).gradients(), expected)  # what this module is for


def test_end_comes_after_all_gradients_of_a_module() -> None:
    model = _hooked(applied=True)
    model.gradients()
    weights = {"first.weight", "first.bias", "second.weight", "second.bias"}
    for told in model.told:
        *before, last = told
        assert (set(before), last) == (weights, "end")


def test_nothing_is_added_without_gradients() -> None:
    model = _hooked(applied=True)
    with torch.no_grad():
        y, others = model.blocks[0](torch.ones(1, 7))
    assert others["skip"] is y
    assert model.told == [[], [], []]
