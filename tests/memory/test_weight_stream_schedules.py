"""Weights that pass through slots: no schedule of the streams that their events allow shows a stale byte to anyone.

A slot is filled with NaN before it is written, so that whoever still reads it notices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lowmem_db.memory import weight_stream
from lowmem_db.memory.weight_stream import Residence, WeightStream
from tests.simulated_streams import Device, Event, Queued, streams_of

CPU = torch.device("cpu")
SIZES = [70, 500, 130, 64, 300, 90, 200]  # of the segments of a model
NUM_SEEDS = 60
KINDS = ("in order", "nested", "order changes", "frozen", "replaced")
FAULTS: dict[str, Callable[[Device, object, tuple[object, ...]], tuple[object, ...]]] = {
    "computing before the weights are there": lambda device, stream, events: (
        () if stream is device.computation and len(events) == 1 else events
    ),
    "the host reads before they are back": lambda device, stream, events: (
        () if stream is device.computation and len(events) > 1 else events
    ),
    "fetched into a slot that computes": lambda device, stream, events: (
        events[1:] if stream is device.inward else events
    ),
    "fetched into a slot that is copied to the host": lambda device, stream, events: (
        (events[0], *events[2:]) if stream is device.inward else events
    ),
    "fetched before they are back": lambda device, stream, events: events[:-1] if stream is device.inward else events,
    "sent back before they are stepped": lambda device, stream, events: () if stream is device.outward else events,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "MIN_NUMEL", 64)
    monkeypatch.setattr(weight_stream, "_after_backward", lambda callback: None)


@dataclass
class Simulation:
    """A model of one weight for each segment, its stream, and what the weights should be."""

    device: Device
    kind: str
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        layers = [nn.ParameterDict({"weight": nn.Parameter(torch.full((size,), 1.0))}) for size in SIZES]
        for layer in layers if self.kind == "frozen" else []:
            layer.requires_grad_(False)
        self.model = nn.ModuleList(layers)
        self.stream = WeightStream(CPU, trained=True)
        self.outer = self.stream.residence(self.model) if self.kind == "nested" else None
        if self.outer is not None:
            self.model.register_parameter("own", nn.Parameter(torch.full((80,), 1.0)))
        self.residences = [self.stream.residence(layer) for layer in layers]
        self.stream.begin({"model": self.model})
        self.expected = {each: self.weight(each).detach().clone() for each in self.all}

    @property
    def all(self) -> list[Residence]:
        return [*self.residences, *([] if self.outer is None else [self.outer])]

    def weight(self, residence: Residence) -> nn.Parameter:
        assert residence.group is not None
        return residence.group.parameters[0]

    def compute(self, residence: Residence, expected: Tensor | None = None) -> None:
        """Queue the use of a weight, some time after it may be expected to be there."""
        expected = self.expected[residence].clone() if expected is None else expected
        view = self.weight(residence).data

        def use() -> None:
            if not torch.equal(view, expected):
                self.wrong.append("computed with other weights")

        for _ in range(self.device.random.choice([1, 4])):
            self.device.computation.queue.append(use)

    def step(self, residence: Residence, number: int) -> None:
        if self.kind == "frozen":
            return
        view = self.weight(residence).data
        self.device.computation.queue.append(lambda: view.mul_(0.5).add_(number))
        self.expected[residence] = self.expected[residence] * 0.5 + number

    def forward(self, order: list[Residence]) -> None:
        for residence in order:
            self.device.run_some()
            with residence.on_device():
                self.compute(residence)

    def backward(self, order: list[Residence], number: int) -> None:
        if self.outer is not None and self.outer.group is not None:  # its recomputation runs what is inside once more
            self.stream.hold(self.outer.group)
            self.compute(self.outer)
            self.forward(order)
        for residence in reversed(order):
            self.device.run_some()
            assert residence.group is not None
            self.stream.hold(residence.group)
            self.compute(residence)
            self.device.run_some()
            self.step(residence, number)
            self.stream.let_go(residence.group)
        if self.outer is not None and self.outer.group is not None:
            self.step(self.outer, number)
            self.stream.let_go(self.outer.group)
        self.stream._end_backward()

    def draw(self) -> None:
        """Compute with other weights, as an average would be."""
        own = {each: self.weight(each).data for each in self.residences}
        others = {each: torch.full_like(own[each], 7.0) for each in self.residences}
        for residence in self.residences:
            self.weight(residence).data = others[residence]
        self.stream.begin_pass("model")
        for residence in self.residences:
            self.device.run_some()
            with residence.on_device():
                self.compute(residence, others[residence])
        for residence in self.residences:
            self.weight(residence).data = own[residence]

    def read(self) -> None:
        """Read the weights on the host, once it has waited for the computation."""
        done = Event()
        done.record(self.device.computation)
        done.synchronize()
        for residence in self.all:
            if not torch.equal(self.weight(residence).data, self.expected[residence]):
                self.wrong.append("the host has other weights")

    def run(self) -> None:
        order = list(self.residences)
        for number in range(1, 7):
            if self.kind == "order changes" and number in {3, 5}:
                self.device.random.shuffle(order)
            used = order[1:] if self.kind == "order changes" and number == 4 else order
            if self.kind == "replaced" and number in {2, 4}:
                self.draw()
            self.stream.begin_pass("model")
            self.forward(used)
            self.backward(used, number)
            if number in {2, 3, 6}:  # a checkpoint; what steps report is read each time, but may be of no weight
                self.read()
            if number == 3 and self.kind != "frozen":  # which may also be restored
                for residence in self.all:
                    self.weight(residence).data.fill_(0.25)
                    self.expected[residence] = torch.full_like(self.expected[residence], 0.25)
        while self.device.run_one():
            pass
        self.read()


class Poisoning(Queued):
    """What a copy overwrites becomes NaN first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            target = args[0]
            self.stream.queue.append(lambda: target.view(torch.uint8).fill_(255))
        return super().__torch_function__(func, types, args, kwargs)


def simulate(seed: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    simulation = Simulation(Device(seed), kind)
    with streams_of(simulation.device, simulation.stream, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "stream", Poisoning)
        simulation.run()
    return simulation


@pytest.mark.parametrize("kind", KINDS)
def test_no_schedule_of_the_streams_shows_a_stale_byte(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(NUM_SEEDS):
        assert simulate(seed, kind, monkeypatch).wrong == [], f"seed {seed}"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_wait_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, found = weight_stream.wait, []
    for seed in range(NUM_SEEDS):
        simulation = Simulation(Device(seed), "in order")

        def faulty(stream, *events, device=simulation.device):
            wait(stream, *FAULTS[fault](device, stream, events))

        with streams_of(simulation.device, simulation.stream, monkeypatch), monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "stream", Poisoning)
            patch.setattr(weight_stream, "wait", faulty)
            simulation.run()
        found += simulation.wrong
        if found:
            return
    pytest.fail("no schedule noticed it")
