"""How FSDP2 moves weights and gradients that are shared out: through the world, which knows when a process has died.

The interface is that of ``FSDPModule.set_custom_all_gather`` and ``set_custom_reduce_scatter``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_db.distributed.world import World


class _Exchange:
    """An exchange of tensors.

    Args:
        world: The processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for what is exchanged."""
        return torch.empty(*size, dtype=dtype, device=device)


class Collected(_Exchange):
    """Puts weights together."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """Overwrite ``output_tensor`` with the ``input_tensor`` of all processes."""
        del group, async_op
        self.world.collect(output_tensor, input_tensor)


class PartOfSum(_Exchange):
    """Adds up gradients in an order that the library chooses."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Overwrite ``output_tensor`` with this process's part of the sum of ``input_tensor``."""
        del group, op, async_op
        self.world.add_parts(output_tensor, input_tensor)


class OrderedSum(PartOfSum):
    """Adds up gradients in the order of one process: batch by batch, and in each round by rank.

    Args:
        world: The processes.
        accumulates: Whether a step has more than one batch for each process.
    """

    def __init__(self, world: World, *, accumulates: bool) -> None:
        super().__init__(world)
        self._accumulates = accumulates
        self._sum: Tensor | None = None

    def forget(self) -> None:
        """Start a new sum with the next batch."""
        self._sum = None

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Overwrite ``output_tensor`` with this process's part of the sum over all batches so far."""
        del group, op, async_op
        received = torch.empty_like(input_tensor)
        self.world.swap(received, input_tensor)
        terms = [*received.chunk(self.world.size)]
        if self._sum is not None and self._sum.shape != output_tensor.shape:
            raise RuntimeError("two batches have gradients of different parameters")
        output_tensor.copy_(terms.pop(0) if self._sum is None else self._sum)
        for term in terms:
            output_tensor.add_(term)
        if self._accumulates:
            self._sum = output_tensor
