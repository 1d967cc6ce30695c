"""Tensors whose rows are shared out between processes, as FSDP2 does it (arXiv:2304.11277): rank 0 has the first ones.

Such a tensor is a ``DTensor``: it has the shape of the whole, and holds the rows of this process.
"""

from typing import Any, cast

import torch
from torch import Tensor

from lowmem_db.distributed.world import World


def is_shared(tensor: Tensor) -> bool:
    """Return whether each process holds only some rows of a tensor."""
    return hasattr(tensor, "to_local")  # importing DTensor takes a second


def own(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor; the memory is shared."""
    if not is_shared(tensor):
        return tensor
    with torch.no_grad():
        return cast("Any", tensor).to_local()


def rows_of(num_rows: int, size: int) -> list[slice]:
    """Return the rows of each process: as many for all, but fewer for the last ones if they run out."""
    each = -(-num_rows // size)
    return [slice(min(rank * each, num_rows), min((rank + 1) * each, num_rows)) for rank in range(size)]


def can_be_shared(shape: torch.Size, size: int, block: int = 1) -> bool:
    """Return whether the rows of a tensor can be shared out so that every process has some.

    Args:
        shape: Shape of the whole.
        size: Number of processes.
        block: Elements that must not be separated, counted from the first one.
    """
    if not shape:
        return False
    each = -(-shape[0] // size)
    return each * (size - 1) < shape[0] and each * shape[1:].numel() % block == 0


def whole(tensor: Tensor, world: World) -> Tensor:
    """Return the whole of a tensor that is shared out; all processes call this together."""
    parts = own(tensor)
    return joined_parts(
        parts, tensor.shape, [rows.stop - rows.start for rows in rows_of(len(tensor), world.size)], world
    )


def joined_parts(part: Tensor, shape: torch.Size, lengths: list[int], world: World) -> Tensor:
    """Return a tensor that all processes put together.

    Args:
        part: What this process has of it.
        shape: Shape of the whole.
        lengths: How long the part of each process is in the first dimension.
        world: The processes.
    """
    found = torch.empty(shape, dtype=part.dtype, device=part.device)
    for rank, piece in enumerate(found.split(lengths)):
        if rank == world.rank:
            piece.copy_(part)
        world.send_from(rank, [piece])
    return found
