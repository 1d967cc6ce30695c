"""Steps on the host: no schedule of streams and thread that their waits allow shows a stale byte to anyone.

What a copy or a new gradient overwrites is filled with NaN first, so that whoever still reads it notices.
"""

import weakref
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor, nn

from lowmem_db.memory import weight_stream
from lowmem_db.memory.weight_stream import Residence, weights_on_host
from lowmem_db.optimizers import on_host
from lowmem_db.optimizers.on_host import HostStep
from lowmem_db.optimizers.rules import StepScalars
from lowmem_db.optimizers.states import ResidentStates, StateLayout, flat
from lowmem_db.optimizers.units import LargeParameter
from tests.memory.test_weight_stream_schedules import CPU, Simulation
from tests.simulated_streams import Device, Queued, Stream, streams_of

NUM_SEEDS = 70
KINDS = ("in order", "nested", "order changes")
STAYS = "model.stays"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "MIN_NUMEL", 64)
    monkeypatch.setattr(weight_stream, "_after_backward", lambda callback: None)


class HalfAndGradient:
    """``weight = weight / 2 + scale * gradient``."""

    reports_norm = True

    def state_tensors(self, parameter, *, small):
        del small
        return [flat("sum", parameter.numel())]

    def step(self, parameter, gradient, state, scalars, *, rounding_seed):
        del rounding_seed
        assert scalars.gradient_scale is not None
        state["sum"].add_(gradient.flatten())
        parameter.mul_(0.5).add_(gradient * scalars.gradient_scale)
        return gradient.square().sum()


class Thread:
    """The thread of the host, as a stream of a simulated device."""

    def __init__(self, host: Stream) -> None:
        self._host = host

    def submit(self, function, arrived, step) -> Future:
        del function
        if arrived is not None:
            self._host.wait_event(arrived)
        future = Stepped(self._host)
        self._host.queue.append(lambda: future.set_result(step()))
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Do nothing; who needs results has waited for them."""


class Stepped(Future):
    """A step that runs when the simulated device wants it to."""

    def __init__(self, host: Stream) -> None:
        super().__init__()
        self._host = host

    def result(self, timeout=None):
        del timeout
        while not self.done():
            assert self._host.device.run_one(), "nothing can run"
        return super().result(0)


class Memory:
    """Memory of gradients on the device: what nobody refers to is used again at once, as by the caching allocator."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._blocks: list[tuple[Tensor, weakref.ref]] = []

    def gradient_like(self, weight: Tensor, value: float) -> Tensor:
        """Let the computation write a gradient."""
        free = [block for block, user in self._blocks if user() is None and len(block) >= weight.numel()]
        block = free[-1] if free else torch.empty(weight.numel())
        self._blocks = [each for each in self._blocks if each[0] is not block]
        gradient = block[: weight.numel()].view(weight.shape)
        self._blocks.append((block, weakref.ref(gradient)))
        written = gradient.detach()
        self._device.computation.queue.append(lambda: written.fill_(torch.nan))
        self._device.computation.queue.append(lambda: written.fill_(value))
        return gradient


class Poisoning(Queued):
    """What a copy overwrites becomes NaN first; what waits to be copied does not keep its memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            target, source = args
            self.stream.queue.append(lambda: target.view(torch.uint8).fill_(255) if target.ndim else target.fill_(9e9))
            return super().__torch_function__(func, types, (target, source.detach()), kwargs)
        return super().__torch_function__(func, types, args, kwargs)


class OnHost(Simulation):
    """A model whose weights stream and are stepped on the host, and one weight that stays on the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stream._steps_on_host = True
        self.memory = Memory(self.device)
        self.stays = nn.Parameter(torch.full((400,), 1.0))
        self.stays_expected = torch.full((400,), 1.0)
        named = {f"model.{number}": self.weight(each) for number, each in enumerate(self.all)} | {STAYS: self.stays}
        layouts = {name: StateLayout([flat("sum", weight.numel())]) for name, weight in named.items()}
        self.states = ResidentStates(layouts, CPU, on_host=True)
        self.units = {weight: LargeParameter(name, weight, self.states, None) for name, weight in named.items()}
        self.sums = dict.fromkeys(named, 0.0)
        units, weights = [*self.units.values()], weights_on_host([self.model])
        assert len(weights) == len(units) - 1
        self.host = HostStep(units, HalfAndGradient(), weights, CPU)
        self.host._outward = self.device.outward
        self.host._new_pool = lambda: Thread(self.device.host)

    def step(self, residence: Residence, number: int) -> None:
        weight = self.weight(residence)
        self.send(weight, number)
        self.expected[residence] = self.expected[residence] * 0.5 + 2.0 * number

    def send(self, weight: nn.Parameter, number: int) -> None:
        scale = torch.empty(())
        written = scale.detach()
        self.device.computation.queue.append(lambda: written.fill_(2.0))
        self.host.send(self.units[weight], self.memory.gradient_like(weight, number), scale)
        self.sums[self.units[weight].name] += number
        self.device.run_some()

    def forward(self, order: list[Residence]) -> None:
        self.use_what_stays()
        super().forward(order)

    def use_what_stays(self) -> None:
        expected, stays = self.stays_expected.clone(), self.stays.data
        self.device.computation.queue.append(
            lambda: None if torch.equal(stays, expected) else self.wrong.append("computed with what had stayed")
        )

    def backward(self, order: list[Residence], number: int) -> None:
        self.host.begin_step({"model": StepScalars(
            learning_rate=torch.zeros(()), step=torch.zeros(()), host_learning_rate=1.0, host_step=number,
            gradient_scale=None, clip_update=False,
        )})  # fmt: skip
        with self.host.running():
            super().backward(order, number)
            self.send(self.stays, number)
        self.stays_expected = self.stays_expected * 0.5 + 2.0 * number
        for name, square in self.host.squared_norms().items():
            numel = next(weight.numel() for weight, unit in self.units.items() if unit.name == name)
            if square.item() != numel * number**2:
                self.wrong.append("another norm")

    def read(self) -> None:
        super().read()
        for name, value in self.sums.items():
            if not torch.equal(found := self.states.at_rest(name)["sum"], torch.full_like(found, value)):
                self.wrong.append("another state")
        if not torch.equal(self.stays.data, self.stays_expected):
            self.wrong.append("the device has other weights")


def simulate(seed: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> OnHost:
    simulation = OnHost(Device(seed), kind)
    with streams_of(simulation.device, simulation.stream, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "stream", Poisoning)
        simulation.run()
    return simulation


@pytest.mark.parametrize("kind", KINDS)
def test_no_schedule_shows_a_stale_byte(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(NUM_SEEDS):
        assert simulate(seed, kind, monkeypatch).wrong == [], f"seed {seed}"


def _gradient_is_read_before_it_has_arrived(patch: pytest.MonkeyPatch) -> None:
    submit = Thread.submit
    patch.setattr(Thread, "submit", lambda self, function, arrived, step: submit(self, function, None, step))


def _gradient_leaves_before_it_is_computed(patch: pytest.MonkeyPatch) -> None:
    wait = on_host.wait
    patch.setattr(on_host, "wait", lambda s, *e: None if s is s.device.outward else wait(s, *e))


def _memory_of_a_gradient_is_used_again_before_it_has_left(patch: pytest.MonkeyPatch) -> None:
    wait = on_host.wait
    patch.setattr(on_host, "wait", lambda s, *e: None if s is s.device.computation else wait(s, *e))


def _place_in_the_ring_is_used_again_before_the_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(on_host._Sent, "overlaps", lambda self, start, stop: False)


def _weights_are_fetched_before_the_step_is_done(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostStep, "_result", lambda self, name: None)


FAULTS: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    _gradient_is_read_before_it_has_arrived,
    _gradient_leaves_before_it_is_computed,
    _memory_of_a_gradient_is_used_again_before_it_has_left,
    _place_in_the_ring_is_used_again_before_the_step,
    _weights_are_fetched_before_the_step_is_done,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_missing_wait_is_noticed(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch) -> None:
    fault(monkeypatch)
    for seed in range(NUM_SEEDS):
        if simulate(seed, "in order", monkeypatch).wrong:
            return
    pytest.fail("no schedule noticed it")
