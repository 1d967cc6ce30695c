"""Adding up the gradients of all processes, so that each steps with the same ones."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowmem_db.config.schema import Config
from lowmem_db.distributed.world import ALONE, World, flat

_AT_ONCE = 1 << 20
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Reduction:
    """Gradients are added up once per step, in an order that the library chooses.

    It is the same order for the same number of processes. Two numbers have the same sum in any order, so that two
    processes with one batch each compute the bits of one process with two.

    Args:
        world: The processes.

    Attributes:
        order: A checksum of what was reduced in the backward pass, and in which order: the same on all processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.order = 0

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Reduce what must not wait for the end of the step."""

    def complete(self, parameters: Sequence[nn.Parameter]) -> None:
        """Reduce the gradients of a step, in place; afterwards all processes have their sums."""
        if self.world.size > 1:
            self._add([parameter.grad for parameter in parameters if parameter.grad is not None])

    def at_once(self, name: str, gradients: Sequence[Tensor]) -> None:
        """Reduce gradients in the backward pass, in place.

        Args:
            name: Whose they are.
            gradients: The same ones on all processes.
        """
        if self.world.size > 1:
            self.order = zlib.crc32(name.encode(), self.order)
            self._add(gradients)

    def _add(self, gradients: Sequence[Tensor]) -> None:
        self.world.add(gradients)


class OrderedReduction(Reduction):
    """Gradients are added in the order of one process: batch by batch, and in each round by rank.

    The first process accumulates; the others give it each gradient as soon as they have it, and keep none. That takes
    as much traffic for every accumulated batch as :class:`Reduction` takes for a step.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._given: list[nn.Parameter] = []

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients of a batch to the sums of the first process."""
        self._given = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in self._given:
            assert parameter.grad is not None, "it was filtered"
            self._give(parameter.grad)
            if not self.world.is_first:
                parameter.grad = None

    def complete(self, parameters: Sequence[nn.Parameter]) -> None:
        """Hand out the sums of the first process."""
        del parameters
        for parameter in self._given:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            self.world.send_from(0, [parameter.grad])

    def _add(self, gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            self._give(gradient)
            self.world.send_from(0, [gradient])

    def _give(self, gradient: Tensor) -> None:
        for rank in range(1, self.world.size):
            given = gradient if rank == self.world.rank else torch.empty_like(gradient)
            self.world.send_from(rank, [given])
            if self.world.is_first:
                gradient.add_(given)


NO_REDUCTION = Reduction(ALONE)
"""There is one process."""


def reduction_for(world: World, config: Config) -> Reduction:
    """Return how gradients are added up.

    Args:
        world: The processes.
        config: The resolved configuration.
    """
    return OrderedReduction(world) if world.size > 1 and is_ordered(config) else Reduction(world)


def is_ordered(config: Config) -> bool:
    """Return whether gradients are added in the order of one process; by default where two processes need it."""
    if config.distributed.reduce is not None:
        return config.distributed.reduce == "ordered"
    batches = config.training.gradient_accumulation_steps * (config.memory.micro_batches or 1)
    return config.distributed.num_processes == 2 and batches > 1


@torch.no_grad()
def bits_of(parameters: Sequence[nn.Parameter]) -> int:
    """Return a sum over the bits of parameters, which differs if one of them does."""
    numbers = [flat(each.detach()).view(_WHOLE_NUMBERS[each.element_size()]) for each in parameters]
    pieces = [piece for each in numbers for piece in each.split(_AT_ONCE)]  # a sum has a copy of 64 bits
    return sum(torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).tolist())
