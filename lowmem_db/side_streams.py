"""Copies between host and device beside the computation: CUDA streams and events, or nothing on a CPU.

Without a stream a copy is synchronous, and every function here does nothing.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

Stream = torch.cuda.Stream | None
Event = torch.cuda.Event | None


def side_stream(device: torch.device) -> Stream:
    """Return a new stream; its first work comes after all that is queued so far."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # memory that it copies to may be in use until then
    return stream


def computation(side: Stream, device: torch.device) -> Stream:
    """Return the stream that computes, or None if there is no side stream."""
    return None if side is None else torch.cuda.current_stream(device)


def on(stream: Stream) -> AbstractContextManager[object]:
    """Return a context in which copies are queued on a stream."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def wait(stream: Stream, *events: Event) -> None:
    """Let what is queued on a stream from now on wait for events."""
    for event in events:
        if stream is not None and event is not None:
            stream.wait_event(event)


def record(stream: Stream) -> Event:
    """Return the event at which all that is queued on a stream is done."""
    if stream is None:
        return None
    event = torch.cuda.Event()
    event.record(stream)
    return event


def current_stream_id(device: torch.device) -> int:
    """Return a number for the stream that work on a device goes to now; 0 without streams."""
    return torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
