"""Tensors in the host's memory that a device reads and writes asynchronously, or that the host itself computes with.

Data that leaves a device for the host is allocated here: pinned for a CUDA device, so that copies overlap with the
computation; pageable for the CPU. In a trace on the meta device nothing is allocated, and observers are told, so that
host bytes can be counted separately from device bytes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_CHUNK_BYTES = 256 * 2**20  # torch rounds pinned allocations up to a power of two; small ones waste little
_computes: ContextVar[bool] = ContextVar("computes_on_host", default=False)
_observers: list[Callable[[Tensor], None]] = []


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, *, device: torch.device) -> Tensor:
    """Allocate a tensor on the host.

    Args:
        shape: Its shape.
        dtype: Its type.
        device: The device it is copied to and from.

    Raises:
        MemoryError: The host has no pinned memory left; CUDA's own error says no more than that memory ran out.
    """
    if device.type == "cuda":
        tensor = _pinned(tuple(shape), dtype)
    else:
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta" if device.type == "meta" else "cpu")
    for observer in _observers:
        observer(tensor)
    return tensor


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        mib = math.prod(shape) * dtype.itemsize / 2**20
        raise MemoryError(f"the host has no {mib:.1f} MiB of pinned memory left") from None


def full_on_host(shape: Sequence[int], value: float, dtype: torch.dtype, *, device: torch.device) -> Tensor:
    """Return a tensor that the host computes with, and that is not copied to or from a device.

    Args:
        shape: Its shape.
        value: Its elements.
        dtype: Its type.
        device: The device that the host computes beside.
    """
    with computing():
        return torch.full(tuple(shape), value, dtype=dtype, device="meta" if device.type == "meta" else "cpu")


def pieces_on_host(sizes: Sequence[int], *, device: torch.device) -> list[Tensor]:
    """Allocate zeroed uint8 tensors on the host, many of them in one allocation.

    Args:
        sizes: Bytes of each piece.
        device: The device they are copied to and from.
    """
    return [*each_piece_on_host(sizes, device=device)]


def each_piece_on_host(sizes: Sequence[int], *, device: torch.device) -> Iterator[Tensor]:
    """Yield the tensors of :func:`pieces_on_host`; what holds them is allocated when the first of them is wanted."""
    for chunk in _chunks(sizes):
        yield from empty_on_host((sum(chunk),), torch.uint8, device=device).zero_().split(chunk)


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move a module's tensors to a device, except what is in pinned memory: what streams stays on the host."""
    module._apply(lambda tensor: tensor if tensor.is_pinned() else tensor.to(device))


def _chunks(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Group consecutive sizes so that each sum fits into a chunk; a larger size is a group of its own."""
    chunk: list[int] = []
    for size in sizes:
        if chunk and sum(chunk) + size > _CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(size)
    if chunk:
        yield chunk


@contextmanager
def computing() -> Iterator[None]:
    """Say that this thread computes on the host inside the block: in a trace, whatever is made there is on the host."""
    token = _computes.set(True)
    try:
        yield
    finally:
        _computes.reset(token)


def is_computing() -> bool:
    """Return whether this thread is in :func:`computing`."""
    return _computes.get()


@contextmanager
def observed(observer: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell ``observer`` about every tensor that is allocated on the host inside the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
