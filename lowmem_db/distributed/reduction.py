"""Adding up the gradients of all processes, so that each steps with the same ones."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowmem_db.config.schema import Config
from lowmem_db.distributed.scattering import OrderedSum, PartOfSum
from lowmem_db.distributed.shards import is_shared, own, whole
from lowmem_db.distributed.world import ALONE, World, flat

_AT_ONCE = 1 << 20
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Reduction:
    """Gradients are added up once per step, in an order that the library chooses.

    It is the same order for the same number of processes. Two numbers have the same sum in any order, so that two
    processes with one batch each compute the bits of one process with two.

    Gradients of weights that are shared out come here as sums: FSDP2 adds them up with what :meth:`scattering` returns.

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
            self._add([each.grad for each in parameters if each.grad is not None and not is_shared(each)])

    def at_once(self, name: str, gradients: Sequence[Tensor]) -> None:
        """Reduce gradients in the backward pass, in place.

        Args:
            name: Whose they are.
            gradients: The same ones on all processes.
        """
        if self.world.size > 1:
            self.order = zlib.crc32(name.encode(), self.order)
            self._add([gradient for gradient in gradients if not is_shared(gradient)])

    def scattering(self) -> PartOfSum:
        """Return what adds up the gradients of some weights that are shared out."""
        return PartOfSum(self.world)

    def norms(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of each gradient, in fp32; of one that is shared out, that of the whole."""
        norms = torch.stack(torch._foreach_norm([own(each) for each in gradients], 2.0, dtype=torch.float32))
        shared = [index for index, gradient in enumerate(gradients) if is_shared(gradient)]
        if shared:
            norms[shared] = self.total(norms[shared].square()).sqrt()
        return norms

    def total(self, shares: Tensor) -> Tensor:
        """Return the sums over all processes of numbers that each has computed from its rows."""
        found = shares.clone()
        self.world.add([found])
        return found

    def _add(self, gradients: Sequence[Tensor]) -> None:
        self.world.add(gradients)


class OrderedReduction(Reduction):
    """Gradients are added in the order of one process: batch by batch, and in each round by rank.

    The first process accumulates; the others give it each gradient as soon as they have it, and keep none. That takes
    as much traffic for every accumulated batch as :class:`Reduction` takes for a step.

    Args:
        world: The processes.
        accumulates: Whether a step has more than one batch for each process.
    """

    def __init__(self, world: World, *, accumulates: bool = True) -> None:
        super().__init__(world)
        self._accumulates = accumulates
        self._given: list[nn.Parameter] = []
        self._sums: list[OrderedSum] = []
        self._summed: list[tuple[nn.Parameter, Tensor]] = []

    def scattering(self) -> OrderedSum:
        """Return what adds up the gradients of some weights that are shared out."""
        self._sums.append(OrderedSum(self.world, accumulates=self._accumulates))
        return self._sums[-1]

    def norms(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of each gradient, as one process computes it."""
        return torch.cat([super(OrderedReduction, self).norms([self._whole(each)]) for each in gradients])

    def _whole(self, gradient: Tensor) -> Tensor:
        return whole(gradient, self.world) if is_shared(gradient) else gradient

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients of a batch to the sums of the first process."""
        self._take_sums(parameters)
        self._given = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in self._given:
            assert parameter.grad is not None, "it was filtered"
            self._give(parameter.grad)
            if not self.world.is_first:
                parameter.grad = None

    def complete(self, parameters: Sequence[nn.Parameter]) -> None:
        """Hand out the sums of the first process."""
        del parameters
        self._put_sums()
        for parameter in self._given:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            self.world.send_from(0, [parameter.grad])

    def _take_sums(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the sums of what is shared out, so that FSDP2 does not add them to those of the next batch."""
        self._summed = [(each, each.grad) for each in parameters if each.grad is not None and is_shared(each)]
        for parameter, _ in self._summed:
            parameter.grad = None

    def _put_sums(self) -> None:
        for parameter, gradient in self._summed:
            parameter.grad = gradient
        self._summed = []
        for each in self._sums:
            each.forget()

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
    if world.size == 1 or not is_ordered(config):
        return Reduction(world)
    return OrderedReduction(world, accumulates=_batches(config) > 1)


def is_ordered(config: Config) -> bool:
    """Return whether gradients are added in the order of one process; by default where two processes need it."""
    if config.distributed.reduce is not None:
        return config.distributed.reduce == "ordered"
    is_shared_out = config.distributed.sharding == "full"
    return config.distributed.num_processes == 2 and (_batches(config) > 1 or is_shared_out)


def _batches(config: Config) -> int:
    """Return how many batches each process computes in a step."""
    return config.training.gradient_accumulation_steps * (config.memory.micro_batches or 1)


@torch.no_grad()
def bits_of(parameters: Sequence[nn.Parameter]) -> int:
    """Return a sum over the bits of parameters, which differs if one of them does; not of those that are shared out."""
    whole = [each for each in parameters if not is_shared(each)]
    if not whole:
        return 0
    numbers = [flat(each.detach()).view(_WHOLE_NUMBERS[each.element_size()]) for each in whole]
    pieces = [piece for each in numbers for piece in each.split(_AT_ONCE)]  # a sum has a copy of 64 bits
    return sum(torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).tolist())
