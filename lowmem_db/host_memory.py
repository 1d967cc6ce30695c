"""Tensors in the host's memory that a device reads and writes asynchronously.

Whoever keeps something of the device on the host allocates it here: pinned for a CUDA device, so that copies run beside
the computation; plain for the CPU. Under a trace on the meta device nothing is allocated, and observers are told, so
that host and device bytes can be told apart.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_observers: list[Callable[[Tensor], None]] = []


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, *, device: torch.device) -> Tensor:
    """Allocate a tensor on the host.

    Args:
        shape: Its shape.
        dtype: Its type.
        device: The device it is copied to and from.
    """
    where = "meta" if device.type == "meta" else "cpu"
    tensor = torch.empty(tuple(shape), dtype=dtype, device=where, pin_memory=device.type == "cuda")
    for observer in _observers:
        observer(tensor)
    return tensor


@contextmanager
def observed(observer: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell ``observer`` of every tensor that is allocated on the host inside the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
