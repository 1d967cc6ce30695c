"""The processes of a run: what they tell each other, and how each learns that another one has ended."""

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_db.distributed.watch import Watch
from lowmem_db.errors import ConfigError, DataError, LowmemDbError, RunInterrupted
from lowmem_db.launch import launched

_Value = TypeVar("_Value")
_FOREVER = timedelta(days=30)  # whether a process is alive is known without a time limit
_TO_MEET = timedelta(minutes=10)
_BLOCK = 4096  # bytes of a message that needs one exchange
_LENGTH = 8
_PARCEL = 1 << 18  # elements
_ON_THE_WAY = 4  # parcels: they take memory
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # as torch 2.13 calls it
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class World:
    """The processes that share each step of a run. Alone, every exchange returns what it is given.

    Args:
        rank: Number of this process, from 0; the first one writes the run folder.
        size: Number of processes.
        group: Group of torch.distributed; None for one process.
        watch: Listens to the other processes; None for one process.
        has_nccl: Whether the group exchanges tensors on cards in their streams, so that this process need not wait.

    Attributes:
        rank, size: See above.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        group: Any = None,
        watch: Watch | None = None,
        has_nccl: bool = False,
    ) -> None:
        self.rank, self.size = rank, size
        self._group, self._watch, self._has_nccl = group, watch, has_nccl

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[_Value]) -> Sequence[_Value]:
        """Return this process's part of some work: every item belongs to one process."""
        return items[self.rank :: self.size]

    def gathered(self, value: _Value) -> list[_Value]:
        """Return the values of all processes, by rank; they are pickled."""
        if self.size == 1:
            return [value]
        data = pickle.dumps(value)
        blocks = self._gather_bytes(_in_block(data, _BLOCK))
        lengths = [int.from_bytes(block[:_LENGTH], "little") for block in blocks]
        if max(lengths) > _BLOCK - _LENGTH:
            blocks = self._gather_bytes(_in_block(data, max(lengths) + _LENGTH))
        return [pickle.loads(block[_LENGTH:]) for block in blocks]

    def gathered_in_turn(self, values: Sequence[_Value]) -> list[_Value]:
        """Return the values of all processes: the first one's first, the second one's first, ..., the first's second.

        What :meth:`share` has dealt out comes back in its order.
        """
        if self.size == 1:
            return list(values)
        hands = self.gathered(list(values))
        longest = max(len(hand) for hand in hands)
        return [hand[index] for index in range(longest) for hand in hands if index < len(hand)]

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """Return what the first process makes."""
        return cast("_Value", self.gathered(make() if self.is_first else None)[0])

    def undisturbed(self) -> AbstractContextManager[None]:
        """Return a context in which the end of another process does not end this one."""
        return nullcontext() if self._watch is None else self._watch.held_off()

    def wait_for_all(self) -> None:
        """Wait until every process is here."""
        self.gathered(None)

    def check_same(self, what: str, value: object) -> None:
        """Refuse to go on if the processes have different values.

        Args:
            what: What they are, in words.
            value: This process's.

        Raises:
            DataError: They differ.
        """
        values = self.gathered(value)
        others = [rank for rank, found in enumerate(values) if found != values[0]]
        if others:
            raise DataError(
                f"rank {others[0]} has other {what} than rank 0; all machines need the same files, and cards of the "
                "same kind to compute the same numbers: share cache_dir and the photos between them"
            )

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add up dense tensors over all processes, in place; the order of additions is the library's."""
        self._exchange(tensors, lambda parcel: dist.all_reduce(parcel, group=self._group, async_op=True))

    def least(self, value: Tensor) -> Tensor:
        """Return the element-wise minimum over all processes."""
        if self.size == 1:
            return value
        found = value.clone()
        least = dist.ReduceOp.MIN
        self._exchange([found], lambda parcel: dist.all_reduce(parcel, least, group=self._group, async_op=True))
        return found

    def send_from(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Overwrite dense tensors with those of one process."""
        self._exchange(tensors, lambda parcel: dist.broadcast(parcel, rank, group=self._group, async_op=True))

    def collect(self, parts: Tensor, part: Tensor) -> None:
        """Overwrite ``parts`` with the part of each process, by rank; all parts have the same length."""
        self._wait(_all_gather(parts, part, group=self._group, async_op=True), parts)

    def add_parts(self, part: Tensor, parts: Tensor) -> None:
        """Overwrite ``part`` with this process's part of the sum of ``parts`` over all processes."""
        if part.is_cuda and self._has_nccl:
            self._wait(_reduce_scatter(part, parts, group=self._group, async_op=True), part)
            return
        received = torch.empty_like(parts)
        self.swap(received, parts)
        first, *others = received.chunk(self.size)
        part.copy_(first)
        for other in others:
            part.add_(other)

    def swap(self, received: Tensor, parts: Tensor) -> None:
        """Give each process its part of ``parts``, and overwrite ``received`` with what all have given, by rank."""
        self._wait(dist.all_to_all_single(received, parts, group=self._group, async_op=True), received)

    def mesh(self, device: torch.device) -> Any:
        """Return the processes as torch's ``DeviceMesh`` of one dimension."""
        from torch.distributed.device_mesh import DeviceMesh

        assert self._group is not None, "one process has nobody to share with"
        return DeviceMesh.from_group(self._group, device.type)

    def _exchange(self, tensors: Sequence[Tensor], start: Callable[[Tensor], Any]) -> None:
        """Exchange tensors in place, small ones together: an exchange takes a while even if it moves nothing."""
        on_the_way: deque[tuple[Any, list[Tensor], Tensor]] = deque()
        for together in _parcels(tensors):
            packed = _packed(together)
            on_the_way.append((start(packed), together, packed))
            if len(on_the_way) > _ON_THE_WAY:
                self._unpack(*on_the_way.popleft())
        while on_the_way:
            self._unpack(*on_the_way.popleft())

    def _unpack(self, work: Any, together: Sequence[Tensor], packed: Tensor) -> None:
        """Wait for a parcel, and copy its elements to where they belong."""
        self._wait(work, packed)
        if len(together) > 1:
            pieces = packed.split([tensor.numel() for tensor in together])
            torch._foreach_copy_([flat(tensor) for tensor in together], list(pieces))

    def _wait(self, work: Any, tensor: Tensor) -> None:
        """Wait for the exchange of a tensor."""
        if tensor.is_cuda and self._has_nccl:
            work.wait()  # the stream waits; this process goes on
        else:
            self._finish(work)

    def _finish(self, work: Any) -> None:
        """Wait for an exchange, and no longer than the other processes live.

        Raises:
            RankError: Another process has ended before its work was done.
            RunInterrupted: It was asked to stop.
        """
        assert self._watch is not None, "one process has nobody to wait for"
        future = work.get_future()
        future.add_done_callback(self._watch.look)
        self._watch.wait_for(future.done)
        try:
            future.wait()
        except RuntimeError as error:
            if (reason := self._watch.reason_for(error)) is error:
                raise
            raise reason from error

    def _gather_bytes(self, block: Tensor) -> list[bytes]:
        blocks = [torch.empty_like(block) for _ in range(self.size)]
        self._finish(dist.all_gather(blocks, block, group=self._group, async_op=True))
        return [found.numpy().tobytes() for found in blocks]


ALONE = World()
"""One process."""


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order of memory, whatever its layout; they are shared."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor lie side by side in memory, in some order."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel()


def _parcels(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return tensors in parcels: large ones alone, small ones of a type together."""
    parcels: list[list[Tensor]] = []
    open_parcels: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        together = open_parcels.get(kind, [])
        if tensor.numel() >= _PARCEL or not together or sum(each.numel() for each in together) >= _PARCEL:
            together = []
            parcels.append(together)
        together.append(tensor)
        if tensor.numel() < _PARCEL:
            open_parcels[kind] = together
    return parcels


def _packed(together: Sequence[Tensor]) -> Tensor:
    """Return the elements of a parcel; those of a single tensor are shared with it."""
    return flat(together[0]) if len(together) == 1 else torch.cat([flat(tensor) for tensor in together])


@contextmanager
def joined() -> Iterator[World]:
    """Return a context in which this process works with the others that its launcher started.

    An error in one of them ends all, with the words of the first; nobody ends before everybody knows.

    Raises:
        ConfigError: The launcher's variables do not fit together, or the processes do not find each other.
        RankError: Another process has ended before its work was done.
        RunInterrupted: It was asked to stop.
    """
    launch = launched()
    if launch.size == 1:
        yield ALONE
        return
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    watch, group = _meet(launch.rank, launch.size, "cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    try:
        yield World(launch.rank, launch.size, group=group, watch=watch, has_nccl=has_nccl)
    except BaseException as error:
        watch.leave(_exit_code(error), str(error) or type(error).__name__)
        if (news := watch.bad_news()) is not None and _follows_from(error, news):
            raise news from error
        raise
    watch.leave()
    if (news := watch.bad_news()) is not None:
        raise news
    dist.destroy_process_group()


def _meet(rank: int, size: int, backend: str) -> tuple[Watch, Any]:
    """Find the other processes; return the watch over them, and their group."""
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=_TO_MEET)
        watch = Watch(rank, size, dist.new_group(backend="gloo", timeout=_FOREVER))
        group = dist.new_group(backend=backend, timeout=_FOREVER)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"MASTER_ADDR, MASTER_PORT: rank {rank} of {size} does not find the others at {where} ({reason}); start "
            "each rank once, with the same address of the machine of rank 0 and a port that is free there"
        ) from error
    watch.start()
    return watch, group


def _follows_from(error: BaseException, news: BaseException) -> bool:
    """Return whether an error says nothing but that another process has ended, as a launcher says it by a signal."""
    if isinstance(error, RunInterrupted):
        return not isinstance(news, RunInterrupted)
    return isinstance(error, dist.DistError)


def _exit_code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, LowmemDbError | RunInterrupted) else 1


def _in_block(data: bytes, size: int) -> Tensor:
    """Return the length of a message and the message, if it fits."""
    whole = len(data).to_bytes(_LENGTH, "little") + (data if len(data) + _LENGTH <= size else b"")
    return torch.frombuffer(bytearray(whole.ljust(size, b"\0")), dtype=torch.uint8)


def share_state(world: World, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first process's values of a state that all have, tensor by tensor; dense tensors are overwritten.

    Args:
        world: The processes.
        state: Tensors, numbers and such mappings; all processes have the same names and shapes.
    """
    received: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            received[name] = value.detach() if _is_dense(value) else value.detach().contiguous()
            world.send_from(0, [received[name]])
        elif isinstance(value, Mapping):
            received[name] = share_state(world, value)
        else:
            received[name] = world.gathered(value)[0]
    return received
