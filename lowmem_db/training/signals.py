"""Ctrl-C and SIGTERM: the step in progress is finished, a checkpoint is saved, and then the run stops."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lowmem_db.console import say
from lowmem_db.errors import RunInterrupted


class StopRequest:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first signal into a request; a second one stops at once, without a checkpoint."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            raise RunInterrupted("stopped at once; continue from the newest checkpoint with --resume")
        request.signal_name = signal.Signals(number).name
        say(f"{request.signal_name}: saving a checkpoint after this step; once more to stop at once")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
