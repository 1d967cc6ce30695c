"""Ctrl-C and the other signals that end a run. This module imports quickly and is imported first.

Each signal ends the program with exit code 130 and one line. While there is a model in memory to save, the trainer
replaces this handler by its own.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from lowmem_db.errors import RunInterrupted

Handler = Callable[[int, FrameType | None], object]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
_asked: list[str] = []
_WAY_OUT = "run the same command again"
_OF_TRAINING = ", with --resume if there is a checkpoint"


def stop_signals() -> list[signal.Signals]:
    """Return the signals of this platform that ask a run to stop.

    A closed terminal sends SIGHUP, Slurm sends SIGUSR1 before the time is up, Ctrl-Break on Windows is SIGBREAK. SIGHUP
    is left out if it is ignored, as under ``nohup``.
    """
    known = [number for name in _NAMES if (number := getattr(signal, name, None)) is not None]
    return [number for number in known if number != getattr(signal, "SIGHUP", None) or not _is_ignored(number)]


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Call ``handler`` on every signal that asks to stop, inside the block.

    Raises:
        RunInterrupted: A signal came earlier, and a library swallowed the exception.
    """
    if _asked:
        raise RunInterrupted(_asked[0])
    previous: dict[signal.Signals, Any] = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def exit_on_signals() -> None:
    """End the program on every signal that asks to stop: orderly on the first, at once on the second.

    During an import there is nothing to clean up, and an exception would be lost or leave modules half initialized: the
    program ends at once then.
    """
    _asked.clear()

    def end(number: int, frame: FrameType | None) -> None:
        way_out = _WAY_OUT + (_OF_TRAINING if "train" in sys.argv[1:2] else "")
        message = f"{signal.Signals(number).name}: stopped; {way_out}"
        if _asked or _is_importing(frame):
            leave_at_once(message)
        _asked.append(message)
        raise RunInterrupted(message)

    for number in stop_signals():
        signal.signal(number, end)
    shown = sys.unraisablehook

    def leave_where_swallowed(unraisable: Any) -> None:
        """Callbacks of the interpreter, such as those of imports, swallow exceptions."""
        if isinstance(unraisable.exc_value, RunInterrupted):
            leave_at_once(str(unraisable.exc_value))
        shown(unraisable)

    sys.unraisablehook = leave_where_swallowed


def leave_at_once(message: str) -> None:
    """Print a line and end the program with exit code 130, without waiting for anything."""
    with suppress(OSError, ValueError):  # the terminal may be gone
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
    os._exit(RunInterrupted.exit_code)


def was_asked() -> str | None:
    """Return the message for the signal that came, or None if none did."""
    return _asked[0] if _asked else None


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN
