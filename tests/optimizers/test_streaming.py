"""States that pass through a ring: no schedule of the streams that their events allow may change a byte."""

import pytest
import torch
from torch import Tensor

from lowmem_db.optimizers.states import StateLayout, flat
from lowmem_db.optimizers.streaming import StreamedStates
from tests.simulated_streams import Device, streams_of

CPU = torch.device("cpu")
SIZES = {"a": 60, "b": 500, "c": 130, "d": 64, "e": 300, "f": 1}
LARGEST = 2048  # bytes of b, rounded up to 256


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
