"""Blocks of a model, for each of which the placement of activation checkpoints is chosen separately."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn


class Replacement(NamedTuple):
    """A module and its new forward."""

    module: nn.Module
    forward: Callable[..., Any]


@runtime_checkable
class MakeSegment(Protocol):
    """Makes a segment: a function whose inner tensors are recomputed in the backward pass."""

    def __call__(self, function: Callable[..., Any], part: nn.Module, *, is_outer: bool = True) -> Callable[..., Any]:
        """Return the segment.

        Args:
            function: What the segment computes.
            part: Everything in the model that it runs, and nothing else: its weights may be elsewhere otherwise.
            is_outer: Whether it runs outside any other segment, so that its inputs may be kept on the host.
        """
        ...


class Recomputing(partial[Any]):
    """A forward made of segments."""


@runtime_checkable
class Block(Protocol):
    """A part of a model with one placement of activation checkpoints."""

    @property
    def module(self) -> nn.Module:
        """The module."""
        ...

    def replacements(self, placement: str, segment: MakeSegment) -> list[Replacement] | None:
        """Return the replacements for a placement (``layers``, ``segments``, ``nested``), or None if not supported."""
        ...


@dataclass(frozen=True)
class LayerBlock:
    """A block that is a chain of layers, each of which is a segment for every placement.

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
