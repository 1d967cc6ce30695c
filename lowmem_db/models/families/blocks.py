"""Blocks of a model, each with a placement of checkpoints of its own, and what a placement replaces in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn


class Replacement(NamedTuple):
    """A module, and the forward that it gets."""

    module: nn.Module
    forward: Callable[..., Any]


@runtime_checkable
class MakeSegment(Protocol):
    """Makes a segment: a function whose inner tensors are computed again in the backward pass."""

    def __call__(self, function: Callable[..., Any], part: nn.Module, *, is_outer: bool = True) -> Callable[..., Any]:
        """Return the segment.

        Args:
            function: What it computes.
            part: The part of the model that it computes with.
            is_outer: It does not run inside another segment, so its inputs may be kept on the host.
        """
        ...


class Recomputing(partial[Any]):
    """A forward that is made of segments."""


@runtime_checkable
class Block(Protocol):
    """A part of a model whose checkpoints are placed as one."""

    @property
    def module(self) -> nn.Module:
        """The part."""
        ...

    def replacements(self, placement: str, segment: MakeSegment) -> list[Replacement] | None:
        """Return what is replaced under a placement (``layers``, ``segments`` or ``nested``); None: it is not known."""
        ...


@dataclass(frozen=True)
class LayerBlock:
    """A block that is a chain of layers, each of which is a segment under every placement.

    Attributes:
        module: The block.
        layers: Its layers.
    """

    module: nn.Module
    layers: Sequence[nn.Module]

    def replacements(self, placement: str, segment: MakeSegment) -> list[Replacement]:
        """Return a segment for each layer."""
        del placement
        return [Replacement(layer, segment(layer.forward, layer)) for layer in self.layers]
