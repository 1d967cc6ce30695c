"""Optimizer states in host memory, streamed through the device during the backward pass.

All states are in pinned host memory, allocated once. A ring buffer on the device holds the states of the next
parameters, fetched in advance; a parameter is stepped on the device, and its state is copied back afterwards. The
copies run on two side streams, one per direction. On the CPU the same code copies synchronously.

The bus carries as many bytes as for an optimizer on the host, each state in and out once per step, but the arithmetic
is on the device.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_db.host_memory import pieces_on_host
from lowmem_db.optimizers.states import StateLayout
from lowmem_db.side_streams import Event, on, record, side_stream, wait


@dataclass(frozen=True)
class _Passage:
    """A state in the ring buffer.

    Attributes:
        name: Its parameter.
        start: First byte in the ring.
        stop: Byte after the last one.
        copied: Event at the end of the copy to the device, or back to the host.
    """

    name: str
    start: int
    stop: int
    copied: Event

    def overlaps(self, start: int, stop: int) -> bool:
        """Return whether it overlaps a range of bytes."""
        return self.start < stop and start < self.stop


class StreamedStates:
    """States in host memory.

    Args:
        layouts: Layout of each parameter's state.
        device: Device of the parameters.
        ring_bytes: Size of the ring buffer on the device, at least that of the largest state. Default: twice that.
    """

    def __init__(
        self, layouts: Mapping[str, StateLayout], device: torch.device, *, ring_bytes: int | None = None
    ) -> None:
        self._layouts = dict(layouts)
        sizes = [layout.nbytes for layout in layouts.values()]
        self._ring = torch.empty(ring_bytes or 2 * max(sizes, default=0), dtype=torch.uint8, device=device)
        self._on_host = dict(zip(layouts, pieces_on_host(sizes, device=device), strict=True))
        self._device = device
        self._inward, self._outward = side_stream(device), side_stream(device)
        self._order: list[str] = []  # order in which the last step used the states, and in which they are fetched
        self._taken: list[str] = []  # so far in this step
        self._ahead: deque[str] = deque()  # still to be fetched in this step
        self._fetched: deque[_Passage] = deque()  # in the ring, not yet used
        self._leaving: list[_Passage] = []  # stepped, being copied back to the host
        self._back: dict[str, Event] = {}  # event after which the host has the current state of a parameter
        self._head = 0  # next free byte of the ring

    def begin_step(self) -> None:
        """Start fetching, in the order of the last step."""
        self._order, self._taken = self._taken or self._order, []
        self._ahead = deque(self._order)
        self._fetched.clear()
        self._fetch_ahead()

    @contextmanager
    def on_device(self, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Return a context with the state of one parameter on the device; afterwards it is copied back to the host."""
        passage = self._take(name)
        if passage.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(passage.copied)
        yield self._layouts[name].views(self._ring[passage.start : passage.stop])
        self._send_back(passage)
        self._taken.append(name)
        self._fetch_ahead()

    def at_rest(self, name: str) -> Mapping[str, Tensor]:
        """Return the state of one parameter in host memory, once it has been copied back."""
        if (back := self._back.get(name)) is not None:
            back.synchronize()
        self._fetched.clear()  # the caller may replace what is on the host
        return self._layouts[name].views(self._on_host[name])

    def remove(self, names: Iterable[str]) -> None:
        """Drop the states of some parameters; their host memory stays allocated."""
        for name in names:
            del self._layouts[name]
        self._order = [name for name in self._order if name in self._layouts]
        self._taken = [name for name in self._taken if name in self._layouts]
        self._fetched.clear()

    def _take(self, name: str) -> _Passage:
        """Return a state's place in the ring: fetched in advance or, if the order has changed, now."""
        if self._fetched and self._fetched[0].name == name:
            return self._fetched.popleft()
        self._fetched.clear()
        self._ahead.clear()
        passage = self._fetch(name)
        assert passage is not None, f"the ring has {self._ring.nbytes} bytes, but the state of {name} is larger"
        return passage

    def _fetch_ahead(self) -> None:
        while self._ahead and (passage := self._fetch(self._ahead[0])) is not None:
            self._fetched.append(passage)
            self._ahead.popleft()

    def _fetch(self, name: str) -> _Passage | None:
        """Copy a state into the ring, or return None if states that have not been used leave no room."""
        nbytes = self._layouts[name].nbytes
        start = self._head if self._head + nbytes <= self._ring.nbytes else 0
        stop = start + nbytes
        if stop > self._ring.nbytes or any(passage.overlaps(start, stop) for passage in self._fetched):
            return None
        self._head = stop
        with on(self._inward):
            overwritten = [passage for passage in self._leaving if passage.overlaps(start, stop)]
            self._leaving = [passage for passage in self._leaving if passage not in overwritten]
            wait(self._inward, *(passage.copied for passage in overwritten), self._back.get(name))
            self._ring[start:stop].copy_(self._on_host[name], non_blocking=True)
            return _Passage(name, start, stop, record(self._inward))

    def _send_back(self, passage: _Passage) -> None:
        if self._outward is not None:
            self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with on(self._outward):
            self._on_host[passage.name].copy_(self._ring[passage.start : passage.stop], non_blocking=True)
            back = record(self._outward)
        self._back[passage.name] = back
        self._leaving.append(_Passage(passage.name, passage.start, passage.stop, back))
