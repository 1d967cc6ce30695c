"""Weights in host memory that pass through a few slots on the device, one segment of the model after the other.

The unit is the segment of activation checkpointing. It needs its weights in the forward pass, and again from its
recomputation to the end of its backward pass; in between they are in pinned host memory only. Each segment's large
weights are one run of bytes there, so that one copy brings them to a slot. Where the optimizer steps in the backward
pass, it steps in the slot, and one copy takes the weights back. Copies run on two side streams, one per direction; a
segment is fetched while those before it compute. On the CPU the same code copies synchronously. Where the optimizer
steps on the host, in the run of bytes itself, no weights are copied back.

Weights of less than :data:`MIN_NUMEL` elements, and all that are in no segment, stay on the device. Bytes move,
arithmetic does not: results are bit for bit those of weights that stay.

Others swap blocks of transformers; that a device need hold only what it computes is from arXiv:1602.08124 (feature
maps) and arXiv:2104.07857 (weights and states of language models).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.host_memory import each_piece_on_host
from lowmem_db.side_streams import Event, computation, on, record, side_stream, wait

MIN_NUMEL = 4096  # elements; smaller weights stay on the device, where they are stepped together
SLOTS = "slots_of_streamed_weights"
"""The buffer of the denoiser that is the slots' memory; it is not in its state dict."""
_STREAM = "stream_of_weights"
_ALIGNMENT = 512
_BACKWARD = "backward"
_NUM_SLOTS = 3  # one computes, one arrives, one leaves


@dataclass(eq=False)
class _Group:
    """The weights of one segment.

    Attributes:
        parameters: The weights.
        starts: First byte of each in the group's run.
        on_host: The run in host memory.
        own: The weights in it, as views.
        num_users: How many contexts and backward passes need it on the device now.
        at_rest: What the parameters hold otherwise, while they are on the device.
        back: Event after which the host has what was stepped in a slot.
    """

    parameters: list[nn.Parameter]
    starts: list[int]
    on_host: Tensor
    own: list[Tensor] = field(init=False)
    num_users: int = 0
    at_rest: list[Tensor] = field(default_factory=list)
    back: Event = None

    def __post_init__(self) -> None:
        self.own = self.views(self.on_host)

    @property
    def is_in_its_run(self) -> bool:
        """Whether the parameters are what the host has; samples may use an average instead."""
        pairs = zip(self.parameters, self.own, strict=True)
        return all(parameter.data_ptr() == weight.data_ptr() for parameter, weight in pairs)

    @property
    def trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters)

    def views(self, run: Tensor) -> list[Tensor]:
        """Return the weights as views of a run of bytes."""
        return [
            run[start : start + weight.nbytes].view(weight.dtype).as_strided(weight.shape, weight.stride())
            for start, weight in zip(self.starts, self.parameters, strict=True)
        ]


@dataclass(eq=False)
class _Slot:
    """A place on the device for one group.

    Attributes:
        run: Its bytes.
        group: What it holds, or will hold once it is copied; None if nothing that is of use.
        copied: Event at the end of the copy into it.
        unused: Events after which it can be written again.
        views: The weights of each group that was here, as views.
    """

    run: Tensor
    group: _Group | None = None
    copied: Event = None
    unused: tuple[Event, ...] = ()
    views: dict[_Group, list[Tensor]] = field(default_factory=dict)


class Residence:
    """What one segment needs on the device while it computes; has no effect until the stream begins.

    Args:
        stream: The stream of its weights.
        part: The part of the model that the segment runs.
    """

    def __init__(self, stream: "WeightStream", part: nn.Module) -> None:
        self.stream = stream
        self.part = part
        self.group: _Group | None = None

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Return a context in which the weights are on the device."""
        if self.group is None:
            yield
            return
        self.stream.enter(self.group)
        try:
            yield
        finally:
            self.stream.leave(self.group)

    def run(self, function: Callable[..., Any], checkpointed: Callable[[Callable[..., Any]], Any]) -> Any:
        """Run a segment that is recomputed in the backward pass, and hold its weights from there to its end.

        Args:
            function: What the segment computes.
            checkpointed: Calls a function, and again in the backward pass.
        """
        if self.group is None:
            return checkpointed(function)
        call = _Call(self, self.group, function)
        before = _Before.apply(torch.empty(0, device=self.stream.device, requires_grad=True), call.end)
        return _after(before, checkpointed(call))


class _Call:
    """One call of a segment: first its forward pass, then its recomputation in the backward pass."""

    def __init__(self, residence: Residence, group: _Group, function: Callable[..., Any]) -> None:
        self._residence = residence
        self._group = group
        self._function = function
        self._is_forward = True
        self._is_held = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._is_forward or self._is_held):
            self._is_held = True
            self._residence.stream.hold(self._group)
        self._is_forward = False
        with self._residence.on_device():
            return self._function(*args, **kwargs)

    def end(self) -> None:
        """Let the weights go at the end of the backward pass of the segment."""
        if self._is_held:
            self._is_held = False
            self._residence.stream.let_go(self._group)


class _Before(torch.autograd.Function):
    """Made before the nodes of a segment, and connected to those after it, so that its backward pass runs last.

    Autograd takes the node that was made last among those that are ready, and parameters' gradients before all. The
    gradients of the segment do not pass through this node: that would change the order in which they are added.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, end: Callable[[], None]) -> Tensor:
        ctx.end = end
        ctx.set_materialize_grads(False)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        del gradients
        ctx.end()
        return None, None


class _After(torch.autograd.Function):
    """The identity on what a segment returns; backward goes on with :class:`_Before` too."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        del before
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        del ctx
        return None, *gradients


def _after(before: Tensor, made: Any) -> Any:
    """Return what a segment has made, connected to the node before it unless there is no backward pass."""
    values = made if isinstance(made, tuple) else (made,)
    tensors = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    if not tensors:
        return made
    connected = dict(zip(map(id, tensors), _After.apply(before, *tensors), strict=True))
    values = tuple(connected.get(id(value), value) for value in values)
    return values if isinstance(made, tuple) else values[0]


def weights_on_host(modules: Iterable[nn.Module]) -> dict[nn.Parameter, Tensor]:
    """Return the weights of some components that stream, where they are on the host."""
    streams = [getattr(module, _STREAM, None) for module in modules]
    return {
        parameter: weight
        for stream in streams
        if stream is not None
        for group in stream._groups
        for parameter, weight in zip(group.parameters, group.own, strict=True)
    }


def rest(modules: Iterable[nn.Module]) -> None:
    """Free the slots that weights of some components stream through, until their next pass."""
    for module in modules:
        if (stream := getattr(module, _STREAM, None)) is not None:
            stream.rest()


class WeightStream:
    """The large weights of segments, in host memory.

    A pass is the forward pass of one component, or a backward pass. Weights are fetched in the order of the last pass
    of the same kind, and on demand where the order is another. Nothing is fetched beyond the end of a pass, so that
    between passes the parameters are in host memory, to be read or replaced.

    Args:
        device: Device of the slots.
        trained: Whether weights that train are streamed too, which must then step in the backward pass. If not, they
            stay on the device.
        steps_on_host: Whether the optimizer steps the weights on the host, and not those on the device.
    """

    def __init__(self, device: torch.device, *, trained: bool, steps_on_host: bool = False) -> None:
        self.device = device
        self._trained = trained
        self._steps_on_host = steps_on_host
        self._residences: list[Residence] = []
        self._groups: list[_Group] = []
        self._slots: list[_Slot] = []
        self._inward, self._outward = side_stream(device), side_stream(device)
        self._pass: str | None = None
        self._orders: dict[str, list[_Group]] = {}  # of the last pass of each kind
        self._taken: list[_Group] = []  # so far in this pass
        self._ahead: deque[_Group] = deque()  # still to be fetched in this pass
        self._awaited: deque[_Group] = deque()  # fetched, and not used yet
        self._held: list[_Group] = []  # for the rest of their segment's backward pass
        self._undo: list[Callable[[], None]] = []
        self._num_slots = 0
        self._owner: nn.Module | None = None  # of the slots' memory

    def residence(self, part: nn.Module) -> Residence:
        """Return the residence of a segment that runs a part of the model."""
        found = Residence(self, part)
        self._residences.append(found)
        return found

    def begin(self, modules: Mapping[str, nn.Module]) -> None:
        """Move the weights of all segments to the host; each belongs to the smallest segment that has it.

        Args:
            modules: The components, by name; their parameters keep their identity.
        """
        by_size = sorted(self._residences, key=lambda each: sum(weight.numel() for weight in each.part.parameters()))
        taken: set[nn.Parameter] = set()
        owners = {}
        for residence in by_size:
            own = [weight for weight in residence.part.parameters() if weight not in taken and self._streams(weight)]
            taken |= set(own)
            if own:
                owners[residence] = own
        self._build([owners[residence] for residence in self._residences if residence in owners])
        for residence, group in zip((each for each in self._residences if each in owners), self._groups, strict=True):
            residence.group = group
        self._num_slots = min(_NUM_SLOTS + _is_nested([each.part for each in owners]), len(owners))
        self._owner = next(iter(modules.values()))
        self._make_slots()
        object.__setattr__(self._owner, _STREAM, self)
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(lambda *_, name=name: self.begin_pass(name))
            self._undo.append(handle.remove)

    def undo(self) -> None:
        """Move all weights to the device, where they stay."""
        self._reset()
        for undo in self._undo:
            undo()
        for group in self._groups:
            wait(computation(self._outward, self.device), group.back)
            for parameter in group.parameters:
                parameter.data = parameter.data.to(self.device, copy=True)
        for residence in self._residences:
            residence.group = None
        self._groups.clear()
        self._slots.clear()
        if self._owner is not None:
            delattr(self._owner, SLOTS)
            delattr(self._owner, _STREAM)

    def rest(self) -> None:
        """Free the slots until the next pass."""
        self._reset()
        arriving = [slot.copied for slot in self._slots]
        wait(computation(self._inward, self.device), *arriving, *(group.back for group in self._groups))
        self._slots.clear()
        self._show(torch.empty(0, dtype=torch.uint8, device=self.device))

    def begin_pass(self, name: str) -> None:
        """Begin the forward pass of a component: what is on the device now may be older than what is on the host."""
        self._reset()
        if not self._slots:
            self._make_slots()
        self._start(name)

    def enter(self, group: _Group) -> None:
        """Put the weights of a group on the device."""
        if group.num_users == 0:
            slot = self._take(group)
            wait(computation(self._inward, self.device), slot.copied)
            group.at_rest = [parameter.data for parameter in group.parameters]
            for parameter, view in zip(group.parameters, slot.views[group], strict=True):
                parameter.data = view
        group.num_users += 1
        self._fetch_ahead()

    def leave(self, group: _Group) -> None:
        """Undo :meth:`enter`."""
        group.num_users -= 1
        if group.num_users == 0:
            self._vacate(group)
            self._fetch_ahead()

    def hold(self, group: _Group) -> None:
        """Put the weights of a group on the device until :meth:`let_go`, or the end of the backward pass."""
        if self._pass != _BACKWARD:
            self._start(_BACKWARD)
            _after_backward(self._end_backward)
        self._held.append(group)
        self.enter(group)

    def let_go(self, group: _Group) -> None:
        """Undo :meth:`hold`: all gradients of the group's weights have been used, and its weights may have changed."""
        self._held.remove(group)
        if group.num_users == 1 and group.trains and not self._steps_on_host:
            self._send_back(group)
        self.leave(group)

    def _streams(self, weight: nn.Parameter) -> bool:
        return weight.numel() >= MIN_NUMEL and (self._trained or not weight.requires_grad)

    def _build(self, groups: Sequence[list[nn.Parameter]]) -> None:
        """Move weights to the host, group by group, so that few are there twice."""
        starts = [[0, *accumulate(_aligned(weight.nbytes) for weight in group)] for group in groups]
        pieces = each_piece_on_host([of_group[-1] for of_group in starts], device=self.device)
        for group, of_group, piece in zip(groups, starts, pieces, strict=True):
            made = _Group(group, of_group[:-1], piece)
            for parameter, weight in zip(group, made.own, strict=True):
                weight.copy_(parameter.data)
                parameter.data = weight
            self._groups.append(made)

    def _make_slots(self) -> None:
        """Make slots for the largest group, in one piece of memory."""
        size = max((len(group.on_host) for group in self._groups), default=0)
        runs = torch.empty(self._num_slots, size, dtype=torch.uint8, device=self.device)
        self._slots = [_Slot(run) for run in runs]
        self._show(runs)
        wait(self._inward, record(computation(self._inward, self.device)))  # which may still use that memory

    def _show(self, runs: Tensor) -> None:
        """Make the slots' memory a buffer of a component, for those who count a model's memory."""
        if self._owner is not None:
            self._owner.register_buffer(SLOTS, runs, persistent=False)

    def _start(self, name: str) -> None:
        """Start fetching in the order of the last pass of the same kind."""
        if self._pass is not None:
            self._orders[self._pass] = self._taken
        self._pass, self._taken = name, []
        self._ahead = deque(self._orders.get(name, ()))
        self._fetch_ahead()

    def _end_backward(self) -> None:
        """Let the computation, which the host waits for before it reads weights, wait for the copies to the host."""
        for group in [*self._held]:
            self.let_go(group)
        wait(computation(self._outward, self.device), *(group.back for group in self._groups))
        self._orders[_BACKWARD] = self._taken
        self._pass, self._ahead = None, deque()

    def _reset(self) -> None:
        """Forget what is on the device; after an error there may be weights that nobody let go."""
        self._held.clear()
        self._awaited.clear()
        for slot in [*self._slots]:
            if slot.group is not None and slot.group.num_users:
                slot.group.num_users = 0
                self._vacate(slot.group)
            slot.group = None

    def _take(self, group: _Group) -> _Slot:
        """Return the slot of a group: fetched in advance or, if the order has changed, now."""
        self._taken.append(group)
        if self._awaited and self._awaited[0] is group:
            self._awaited.popleft()
            return self._slot_of(group)
        self._ahead.clear()
        self._awaited.clear()
        return self._slot_of(group) if self._has_slot(group) else self._fetch(group, self._free_slot())

    def _fetch_ahead(self) -> None:
        while self._ahead and self._can_await(self._ahead[0]):
            group = self._ahead.popleft()
            if not self._has_slot(group):
                self._fetch(group, self._free_slot())
            self._awaited.append(group)

    def _can_await(self, group: _Group) -> bool:
        """Return whether a group, as it is on the host now, can be fetched before it is used."""
        if group.num_users or group in self._awaited:
            return False
        return self._has_slot(group) or any(map(self._is_free, self._slots))

    def _is_free(self, slot: _Slot) -> bool:
        return slot.group is None or not (slot.group.num_users or slot.group in self._awaited)

    def _has_slot(self, group: _Group) -> bool:
        return any(slot.group is group for slot in self._slots)

    def _slot_of(self, group: _Group) -> _Slot:
        return next(slot for slot in self._slots if slot.group is group)

    def _free_slot(self) -> _Slot:
        """Return the slot that was left first."""
        return next(filter(self._is_free, self._slots))

    def _fetch(self, group: _Group, slot: _Slot) -> _Slot:
        slot.group = group
        if group not in slot.views:
            slot.views[group] = group.views(slot.run)
        with on(self._inward):
            wait(self._inward, *slot.unused, group.back)
            if group.is_in_its_run:
                slot.run[: len(group.on_host)].copy_(group.on_host, non_blocking=True)
            else:
                for view, parameter in zip(slot.views[group], group.parameters, strict=True):
                    view.copy_(parameter.data, non_blocking=True)
            slot.copied = record(self._inward)
        return slot

    def _send_back(self, group: _Group) -> None:
        wait(self._outward, record(computation(self._outward, self.device)))
        with on(self._outward):
            group.on_host.copy_(self._slot_of(group).run[: len(group.on_host)], non_blocking=True)
            group.back = record(self._outward)

    def _vacate(self, group: _Group) -> None:
        slot = self._slot_of(group)
        slot.unused = (record(computation(self._inward, self.device)), group.back)
        for parameter, weight in zip(group.parameters, group.at_rest, strict=True):
            parameter.data = weight
        self._slots.remove(slot)  # which makes it the last to be used again
        self._slots.append(slot)


def _after_backward(callback: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _is_nested(parts: Sequence[nn.Module]) -> bool:
    """Return whether some parts are inside others."""
    inside = {module for part in parts for module in part.modules() if module is not part}
    return any(part in inside for part in parts)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
