"""Streams of a card that is not there: work waits in queues, which run in a random order that their events allow."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


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
    """Three streams and a thread of its host, run in a random order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams = tuple(Stream(self) for _ in range(4))
        self.computation, self.inward, self.outward, self.host = self.streams
        self.weights = self.random.choice(
            [(1, 1, 1, 1), (100, 1, 1, 1), (1, 100, 1, 1), (1, 1, 100, 1), (1, 1, 1, 100), (100, 100, 1, 1)]
        )

    def run_one(self) -> bool:
        streams = [
            (stream, weight) for stream, weight in zip(self.streams, self.weights, strict=True) if stream.can_run()
        ]
        if streams:
            self.random.choices(*zip(*streams, strict=True))[0].run_one()
        return bool(streams)

    def run_some(self) -> None:
        for _ in range(self.random.choice([0, 0, 1, 5])):
            self.run_one()


class Queued(TorchFunctionMode):
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
def streams_of(device: Device, owner: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the copies of an object with the streams ``_inward`` and ``_outward`` wait in those of a simulated device."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda _: device.computation)
        patch.setattr(torch.cuda, "stream", Queued)
        patch.setattr(owner, "_inward", device.inward)
        patch.setattr(owner, "_outward", device.outward)
        yield
