"""Memory of optimizer states: all tensors of a parameter's state in one contiguous buffer that stays where it is used.

:mod:`lowmem_db.optimizers.streaming` has the same interface for states in host memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowmem_db.host_memory import full_on_host

_ALIGNMENT = 256  # bytes; the widest access of a kernel is 16


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a parameter's state.

    Attributes:
        name: Its name in the state dict.
        dtype: Its type.
        shape: Its shape.
        stride: Its strides; dense.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def like(parameter: Tensor, name: str, dtype: torch.dtype) -> StateTensor:
    """Return a state tensor with a parameter's shape and strides."""
    return StateTensor(name, dtype, tuple(parameter.shape), tuple(parameter.stride()))


def flat(name: str, length: int) -> StateTensor:
    """Return a one-dimensional fp32 state tensor."""
    return StateTensor(name, torch.float32, (length,), (1,))


class StateLayout:
    """Offsets of the tensors of one parameter's state in their buffer.

    Args:
        tensors: The tensors, in order.
    """

    def __init__(self, tensors: Iterable[StateTensor]) -> None:
        self._offsets: list[tuple[StateTensor, int]] = []
        self.nbytes = 0
        for tensor in tensors:
            self._offsets.append((tensor, self.nbytes))
            self.nbytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors as views of a buffer of ``nbytes`` uint8."""
        return {
            tensor.name: buffer[offset : offset + tensor.nbytes]
            .view(tensor.dtype)
            .as_strided(tensor.shape, tensor.stride)
            for tensor, offset in self._offsets
        }


@runtime_checkable
class States(Protocol):
    """The states of many parameters, by name."""

    def begin_step(self) -> None:
        """Prepare for a step of every parameter, in the order of the previous step."""
        ...

    def on_device(self, name: str) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Return a context with the state of one parameter on the device, to be read and written."""
        ...

    def at_rest(self, name: str) -> Mapping[str, Tensor]:
        """Return the state of one parameter where it is between steps, to be read or loaded into."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Drop the states of some parameters."""
        ...


class ResidentStates:
    """States that stay on the device, or on the host if the optimizer steps there.

    Args:
        layouts: Layout of each parameter's state.
        device: Device of the parameters.
        on_host: Whether they are on the host.
    """

    def __init__(self, layouts: Mapping[str, StateLayout], device: torch.device, *, on_host: bool = False) -> None:
        zeros = partial(full_on_host, value=0, device=device) if on_host else partial(torch.zeros, device=device)
        self._views = {
            name: layout.views(zeros((layout.nbytes,), dtype=torch.uint8)) for name, layout in layouts.items()
        }

    def begin_step(self) -> None:
        """Do nothing: the states are where they are used."""

    @contextmanager
    def on_device(self, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Return a context with the state of one parameter."""
        yield self._views[name]

    def at_rest(self, name: str) -> Mapping[str, Tensor]:
        """Return the state of one parameter."""
        return self._views[name]

    def remove(self, names: Iterable[str]) -> None:
        """Free the states of some parameters."""
        for name in names:
            del self._views[name]


def load_into(tensor: Tensor, state: Mapping[str, Any], key: str, *, of: str) -> None:
    """Copy a tensor of a saved state into its place; nothing is broadcast or converted.

    Args:
        tensor: The place.
        state: The saved tensors.
        key: Name of the tensor.
        of: What it belongs to, for messages.

    Raises:
        KeyError: It is missing.
        ValueError: It has another shape or type.
    """
    found = state[key]
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
        there = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{key} of {of} is {there}, not {tensor.dtype} {list(tensor.shape)}")
    tensor.copy_(found)
