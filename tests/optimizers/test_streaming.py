"""States that pass through a ring: no schedule of the streams that their events allow may change a byte."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowmem_db.optimizers.states import StateLayout, flat
from lowmem_db.optimizers.streaming import StreamedStates

CPU = torch.device("cpu")
SIZES = {"a": 60, "b": 500, "c": 130, "d": 64, "e": 300, "f": 1}
LARGEST = 2048  # bytes of b, rounded up to 256


class Event:
    """A place in the queue of a stream."""

    __class__ = torch.cuda.Event  # for checks of types; torch built for CUDA makes real ones only on a card

    def record(self, stream: "Stream") -> None:
        self.stream, self.position = stream, len(stream.queue)

    def synchronize(self) -> None:
        while self.stream.num_done < self.position:
            self.stream.device.run_one()


class Stream:
    """Work in order; other streams may run before or after any of it, but for events."""

    __class__ = torch.cuda.Stream

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.queue: list[Event | Callable[[], object]] = []
        self.num_done = 0

    def wait_event(self, event: Event) -> None:
        self.queue.append(event)

    def wait_stream(self, stream: "Stream") -> None:
        event = Event()
        event.record(stream)
        self.wait_event(event)

    def can_run(self) -> bool:
        if self.num_done == len(self.queue):
            return False
        head = self.queue[self.num_done]
        return not isinstance(head, Event) or head.stream.num_done >= head.position

    def run_one(self) -> None:
        head = self.queue[self.num_done]
        if not isinstance(head, Event):
            head()
        self.num_done += 1


class Device:
    """Three streams, run in a random order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.computation, self.inward, self.outward = (Stream(self) for _ in range(3))
        self.weights = self.random.choice([(1, 1, 1), (100, 1, 1), (1, 100, 1), (1, 1, 100), (100, 100, 1)])

    def run_one(self) -> bool:
        streams = [
            (stream, weight)
            for stream, weight in zip((self.computation, self.inward, self.outward), self.weights, strict=True)
            if stream.can_run()
        ]
        if streams:
            self.random.choices(*zip(*streams, strict=True))[0].run_one()
        return bool(streams)

    def run_some(self) -> None:
        for _ in range(self.random.choice([0, 0, 1, 5])):
            self.run_one()


class _Queued(TorchFunctionMode):
    """Copies wait in the queue of a stream."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            assert kwargs == {"non_blocking": True}, "the host would wait"
            target, source = args
            self.stream.queue.append(lambda: target.copy_(source))
            return target
        return func(*args, **(kwargs or {}))


@contextmanager
def streams_of(device: Device, states: StreamedStates, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda _: device.computation)
        patch.setattr(torch.cuda, "stream", _Queued)
        patch.setattr(states, "_inward", device.inward)
        patch.setattr(states, "_outward", device.outward)
        yield


def build(ring_bytes: int | None = None) -> StreamedStates:
    layouts = {name: StateLayout([flat("x", size)]) for name, size in SIZES.items()}
    return StreamedStates(layouts, CPU, ring_bytes=ring_bytes)


def step(tensor: Tensor, number: int) -> None:
    tensor.mul_(1.5).add_(number)


def load(states: StreamedStates, expected: dict[str, Tensor], number: int) -> None:
    """Replace all states, as a restored checkpoint does."""
    for name, tensor in expected.items():
        assert torch.equal(states.at_rest(name)["x"], tensor), name
        states.at_rest(name)["x"].fill_(number)
        tensor.fill_(number)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("ring_bytes", [LARGEST, LARGEST + 256, None, 4 * LARGEST])
def test_every_schedule_of_the_streams_gives_the_same_states(
    seed: int, ring_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, states = Device(seed), build(ring_bytes)
    expected = {name: torch.zeros(size) for name, size in SIZES.items()}
    order = list(SIZES)
    with streams_of(device, states, monkeypatch):
        for number in range(1, 7):
            if number == 4:
                device.random.shuffle(order)
            if number == 5:
                load(states, expected, number)
            states.begin_step()
            if number == 6:  # some are on their way already
                load(states, expected, number)
            for name in order if number != 3 else order[1:]:  # the third step leaves one out
                device.run_some()
                with states.on_device(name) as state:
                    device.computation.queue.append(lambda x=state["x"], number=number: step(x, number))
                step(expected[name], number)
        for name in SIZES:
            assert torch.equal(states.at_rest(name)["x"], expected[name]), name
        while device.run_one():
            pass
    for name in SIZES:
        assert torch.equal(states.at_rest(name)["x"], expected[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ring_bytes", [4096 * LARGEST, None])
def test_streams_of_a_card_give_the_same_states(ring_bytes: int | None) -> None:
    layouts = {name: StateLayout([flat("x", 4096 * size)]) for name, size in SIZES.items()}
    states = StreamedStates(layouts, torch.device("cuda"), ring_bytes=ring_bytes)
    expected = {name: torch.zeros(4096 * size) for name, size in SIZES.items()}
    for number in range(1, 9):
        states.begin_step()
        for name in reversed(SIZES) if number == 5 else SIZES:
            with states.on_device(name) as state:
                step(state["x"], number)
            step(expected[name], number)
    for name in SIZES:
        assert torch.equal(states.at_rest(name)["x"], expected[name]), name


def test_states_are_fetched_ahead_in_the_order_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    states = build(8 * LARGEST)
    fetched: list[str] = []
    original = states._fetch
    monkeypatch.setattr(states, "_fetch", lambda name: fetched.append(name) or original(name))
    for _ in range(2):
        fetched.clear()
        states.begin_step()
        ahead = list(fetched)
        for name in reversed(SIZES):
            with states.on_device(name):
                pass
    assert ahead == fetched == list(reversed(SIZES))


def test_removed_states_are_fetched_no_more() -> None:
    states = build()
    for _ in range(2):
        states.begin_step()
        for name in SIZES:
            if name in states._layouts:
                with states.on_device(name) as state:
                    state["x"].add_(1)
        states.remove(["b"] if "b" in states._layouts else [])
    assert torch.equal(states.at_rest("e")["x"], torch.full((300,), 2.0))
    with pytest.raises(KeyError):
        states.at_rest("b")


def test_no_states_need_no_memory() -> None:
    states = StreamedStates({}, CPU)
    states.begin_step()
