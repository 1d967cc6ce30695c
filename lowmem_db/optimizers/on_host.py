"""The optimizer's step on the host's CPU, for weights that stream: gradients go out, and weights come in.

A gradient is copied to a ring in pinned host memory as soon as it is complete, and a thread of its own steps the
parameter there while the backward pass goes on; its state never leaves the host. Weights that stream are stepped where
they are. Others, such as embeddings, are copied out with their gradient, and back at the end of the backward pass. In a
trace on the meta device all happens at once, in the thread that is traced.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowmem_db.host_memory import computing, empty_on_host, full_on_host
from lowmem_db.optimizers.rules import StepScalars, UpdateRule
from lowmem_db.optimizers.units import LargeParameter
from lowmem_db.side_streams import Event, computation, on, record, side_stream, wait

_ALIGNMENT = 512
_Result = Tensor | None


@dataclass(frozen=True)
class _Sent:
    """A gradient in the ring.

    Attributes:
        start: First byte in the ring.
        stop: Byte after the last one.
        stepped: The step that reads it.
    """

    start: int
    stop: int
    stepped: "Future[_Result]"

    def overlaps(self, start: int, stop: int) -> bool:
        """Return whether it overlaps a range of bytes."""
        return self.start < stop and start < self.stop


class HostStep:
    """Steps large parameters on the host.

    Args:
        units: The parameters; their states are on the host.
        rule: The optimizer's arithmetic on the CPU.
        weights: The weights that are on the host, by parameter.
        device: Device of the gradients.
    """

    def __init__(
        self,
        units: Sequence[LargeParameter],
        rule: UpdateRule,
        weights: Mapping[nn.Parameter, Tensor],
        device: torch.device,
    ) -> None:
        self.rule = rule
        self._device = device
        self._parameters = {unit.name: unit.parameters[unit.name] for unit in units}
        self._stays = {name: parameter for name, parameter in self._parameters.items() if parameter not in weights}
        self._weights = {
            name: self._copy_of(parameter) if name in self._stays else weights[parameter]
            for name, parameter in self._parameters.items()
        }
        sizes = {name: parameter.nbytes for name, parameter in self._parameters.items()}
        self._ring = empty_on_host((2 * _aligned(max(sizes.values(), default=0)),), torch.uint8, device=device)
        self._most_leaving = max((size for name, size in sizes.items() if name not in self._stays), default=0)
        self._scales = empty_on_host((len(sizes),), torch.float32, device=device)
        self._number_of = {name: number for number, name in enumerate(sizes)}
        self._outward = side_stream(device)
        self._pool: ThreadPoolExecutor | _AtOnce | None = None
        self._scalars: dict[str, StepScalars] = {}
        self._forget()

    def begin_step(self, scalars: Mapping[str, StepScalars]) -> None:
        """Take what a step depends on, by group, to the host."""
        self._scalars = {
            group: replace(
                each,
                learning_rate=full_on_host((), each.host_learning_rate, torch.float32, device=self._device),
                step=full_on_host((), each.host_step, torch.int64, device=self._device),
            )
            for group, each in scalars.items()
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Return a context in which :meth:`send` can be called; at its end all steps are done, and the thread too.

        Raises:
            RuntimeError: A step failed; the message names the field that chose it.
        """
        self._forget()
        self._pool = self._new_pool()
        try:
            yield
            for name in self._steps:
                self._result(name)
            self._bring_back()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            self._leaving.clear()

    def send(self, unit: LargeParameter, gradient: Tensor, scale: Tensor | None) -> None:
        """Let the gradient of a parameter leave, and the parameter be stepped once it has arrived.

        Args:
            unit: The parameter.
            gradient: Its gradient on the device, of its shape and strides.
            scale: fp32 scalar on the device, factor for the gradient.
        """
        assert self._pool is not None, "gradients are sent in a backward pass alone"
        name = unit.name
        start = self._room_for(gradient.nbytes)
        on_host = self._ring[start : start + gradient.nbytes].view(gradient.dtype)
        on_host = on_host.as_strided(gradient.shape, gradient.stride())
        host_scale = None if scale is None else self._scales[self._number_of[name]]
        self._make_way_on_device(gradient.nbytes)
        wait(self._outward, record(computation(self._outward, self._device)))
        with on(self._outward):
            on_host.copy_(gradient, non_blocking=True)
            if host_scale is not None and scale is not None:
                host_scale.copy_(scale, non_blocking=True)
            if name in self._stays:
                self._weights[name].copy_(self._stays[name].data, non_blocking=True)
            arrived = record(self._outward)
        self._leaving.append((gradient, arrived))
        scalars = replace(self._scalars[unit.group], gradient_scale=host_scale)

        def step() -> _Result:
            state = unit.states.at_rest(name)
            with computing(), torch.no_grad():
                return self.rule.step(self._weights[name], on_host, state, scalars, rounding_seed=unit.rounding_seed)

        self._steps[name] = self._pool.submit(_once_arrived, arrived, step)
        self._sent.append(_Sent(start, start + _aligned(gradient.nbytes), self._steps[name]))

    def squared_norms(self) -> dict[str, Tensor]:
        """Return the squares of the gradients' norms on the device, by parameter, if the rule reports them."""
        found = {name: square for name in self._steps if (square := self._result(name)) is not None}
        if not found:
            return {}
        return dict(zip(found, torch.stack([*found.values()]).to(self._device).unbind(), strict=True))

    def _copy_of(self, parameter: nn.Parameter) -> Tensor:
        """Return memory on the host for a weight that stays on the device."""
        run = empty_on_host((parameter.numel(),), parameter.dtype, device=self._device)
        return run.as_strided(parameter.shape, parameter.stride())

    def _new_pool(self) -> "ThreadPoolExecutor | _AtOnce":
        return _AtOnce() if self._device.type == "meta" else ThreadPoolExecutor(1, thread_name_prefix="optimizer_step")

    def _forget(self) -> None:
        """Forget the step before; after an error it may not have been completed."""
        self._steps: dict[str, Future[_Result]] = {}
        self._sent: deque[_Sent] = deque()  # to the ring, in order
        self._leaving: deque[tuple[Tensor, Event]] = deque()  # gradients whose memory may still be read
        self._head = 0  # next free byte of the ring

    def _room_for(self, num_bytes: int) -> int:
        """Return the first byte of a place in the ring, once the steps that read what is there are done."""
        start = self._head if self._head + num_bytes <= len(self._ring) else 0
        self._head = start + _aligned(num_bytes)
        while any(each.overlaps(start, self._head) for each in self._sent):
            _finished(self._sent.popleft().stepped)
        return start

    def _make_way_on_device(self, num_bytes: int) -> None:
        """Free gradients, once they have left, so that those that wait for it take no more than the largest weight."""
        while self._leaving and num_bytes + sum(each.nbytes for each, _ in self._leaving) > self._most_leaving:
            _, arrived = self._leaving.popleft()
            wait(computation(self._outward, self._device), arrived)

    def _bring_back(self) -> None:
        """Copy the weights that stay on the device back to it."""
        with on(computation(self._outward, self._device)):
            for name in self._steps.keys() & self._stays.keys():
                self._stays[name].data.copy_(self._weights[name], non_blocking=True)

    def _result(self, name: str) -> _Result:
        return _finished(self._steps[name])


class _AtOnce:
    """A pool that computes in the thread that asks it to, as a trace needs it."""

    def submit(
        self, function: Callable[[Event, Callable[[], _Result]], _Result], arrived: Event, step: Callable[[], _Result]
    ) -> "Future[_Result]":
        future: Future[_Result] = Future()
        future.set_result(function(arrived, step))
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Do nothing."""
        del wait, cancel_futures


def _once_arrived(arrived: Event, step: Callable[[], _Result]) -> _Result:
    if arrived is not None:
        arrived.synchronize()
    return step()


def _finished(stepped: "Future[_Result]") -> _Result:
    """Return what a step returned.

    Raises:
        RuntimeError: It failed.
    """
    try:
        return stepped.result()
    except Exception as error:
        raise RuntimeError(
            f"memory.optimizer_step: the step on the host failed ({error or type(error).__name__}); some weights have "
            "already been changed. memory.optimizer_step=device steps on the card"
        ) from error


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
