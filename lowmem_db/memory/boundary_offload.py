"""Keep the inputs of checkpointed segments in host memory (as arXiv:1602.08124 does with feature maps).

They are copied out on a separate stream while the forward pass continues, and come back one segment before backward
needs them. A tensor that several segments keep, such as a skip connection, is stored once. Values do not change.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lowmem_db.memory.host_arena import HostArena, Region

MIN_BYTES = 2**20  # smaller tensors stay on the device: their copies cost more time than they free memory
_NUM_AHEAD = 1  # groups being fetched while one is recomputed
_NUM_LEAVING = 2  # tensors that may await their copy on the device before the computation waits for them


class _Host:
    """The host side of one device: memory and a copy stream. For a CPU or meta device, copies are synchronous."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arena = HostArena(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy once the computation queued so far is done; return the event for :meth:`wait`.

        Copies run one after the other, so host memory that is given back can be reused immediately.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(self._stream)
        return copied

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Make computation queued from now on wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)


class _HostCopy:
    """A tensor in host memory, and also on the device while it is being copied.

    Device memory is released only after :meth:`_Host.wait`: the allocator may reuse it immediately.
    """

    def __init__(self, tensor: Tensor, host: _Host, region: Region) -> None:
        self._host = host
        self._region = region
        self._on_host = region.tensor.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        self._on_device: Tensor | None = tensor
        self._version = tensor._version
        self._copied = host.copy(self._on_host, tensor)

    def leave(self) -> None:
        """Release the device's memory.

        Raises:
            RuntimeError: The tensor was changed while it was being copied.
        """
        if self._on_device is None:
            return
        self._host.wait(self._copied)
        if self._on_device._version != self._version:
            raise RuntimeError("a tensor that a checkpointed segment keeps for backward was changed in place")
        self._on_device = None

    def fetch(self) -> None:
        """Start to copy it back to the device, unless it is there."""
        if self._on_device is not None:
            return
        shape, stride, dtype = self._on_host.shape, self._on_host.stride(), self._on_host.dtype
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self._host.device)
        self._copied = self._host.copy(tensor, self._on_host)
        self._on_device, self._version = tensor, tensor._version

    def take(self) -> Tensor:
        """Return it on the device, keeping only the host's copy here."""
        self.fetch()
        tensor = self._on_device
        assert tensor is not None
        self.leave()
        return tensor

    def __del__(self) -> None:
        if self._on_device is not None:
            self._host.wait(self._copied)
        self._host.arena.give_back(self._region)


class _Kept:
    """Placeholder for a tensor in the graph: one use of a copy, by the group with that number."""

    def __init__(self, group: int, copy: _HostCopy) -> None:
        self.group = group
        self.copy = copy
        self.is_due = True


class BoundaryOffload:
    """Keeps tensors saved for backward inside ``with offload.keeping():`` in host memory; each block is a group."""

    def __init__(self) -> None:
        self._hosts: dict[torch.device, _Host] = {}
        self._groups: list[list[weakref.ref[_Kept]]] = []  # in the order of the forward pass
        self._leaving: deque[weakref.ref[_HostCopy]] = deque()
        self._copies: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[object, weakref.ref[_HostCopy]]] = (
            weakref.WeakKeyDictionary()
        )

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep tensors of at least :data:`MIN_BYTES` in host memory."""
        self._drop_groups_of_the_past()
        with saved_tensors_hooks(partial(self._pack, []), self._unpack):
            yield

    def num_bytes_kept(self) -> int:
        """Return the bytes of host memory in use."""
        arenas = [host.arena for host in self._hosts.values()]
        return sum(arena.num_bytes - arena.num_bytes_free for arena in arenas)

    def _drop_groups_of_the_past(self) -> None:
        while self._groups and all(kept() is None for kept in self._groups[-1]):
            self._groups.pop()

    def _pack(self, group: list[weakref.ref[_Kept]], tensor: Tensor) -> Tensor | _Kept:
        if tensor.nbytes <= MIN_BYTES or not _is_dense(tensor):
            return tensor
        if not group:
            self._groups.append(group)
        kept = _Kept(len(self._groups) - 1, self._copy_of(tensor.detach()))
        group.append(weakref.ref(kept))
        return kept

    def _copy_of(self, tensor: Tensor) -> _HostCopy:
        copies = self._copies.setdefault(tensor.untyped_storage(), {})
        key = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor._version)
        copy = copies[key]() if key in copies else None
        if copy is None:
            host = self._host_of(tensor.device)
            copy = _HostCopy(tensor, host, host.arena.take(tensor.nbytes))
            copies[key] = weakref.ref(copy)
            self._let_leave(copy)
        return copy

    def _host_of(self, device: torch.device) -> _Host:
        if device not in self._hosts:
            self._hosts[device] = _Host(device)
        return self._hosts[device]

    def _let_leave(self, copy: _HostCopy) -> None:
        self._leaving.append(weakref.ref(copy))
        if len(self._leaving) > _NUM_LEAVING and (oldest := self._leaving.popleft()()) is not None:
            oldest.leave()

    def _unpack(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        for number in range(kept.group, max(kept.group - _NUM_AHEAD, 0) - 1, -1):
            self._fetch(self._groups[number])
        kept.is_due = False
        return kept.copy.take()

    def _fetch(self, group: list[weakref.ref[_Kept]]) -> None:
        for reference in group:
            kept = reference()
            if kept is not None and kept.is_due:
                kept.copy.fetch()


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the tensor is dense, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
