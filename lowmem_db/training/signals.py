"""Signals during training: the current step is finished, a checkpoint is saved, and the run stops."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lowmem_db.console import say
from lowmem_db.errors import RunInterrupted
from lowmem_db.interruption import handling
from lowmem_db.storage.run_folder import RunFolder


class StopRequest:
    """Whether the run was asked to stop.

    Args:
        run: The run folder.
        step: Returns the optimizer steps done.
        is_passed_on: Whether a launcher sends every signal of the terminal to its processes once more.
    """

    def __init__(self, run: RunFolder, step: Callable[[], int], *, is_passed_on: bool = False) -> None:
        self.signal_name: str | None = None
        self._run, self._step = run, step
        self._left = 2 if is_passed_on else 1  # signals that do not stop the run at once
        self._next = "third" if is_passed_on else "second"
        self._after_checkpoint: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @contextmanager
    def after_checkpoint(self, what: str) -> Iterator[None]:
        """Mark work that follows a checkpoint of this step; a run that was asked to stop ends after it.

        Args:
            what: Its name in messages: ``samples``, ``scores``.

        Raises:
            RunInterrupted: The run was asked to stop; there is nothing left to save.
        """
        self._after_checkpoint = what
        try:
            yield
        finally:
            self._after_checkpoint = None
        if self:
            self.stop()

    def stop(self) -> None:
        """End the run; its checkpoint is saved.

        Raises:
            RunInterrupted: Always.
        """
        raise RunInterrupted(f"{self.signal_name}: stopped after step {self._step()}; continue with --resume")

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; on the second, stop at once and say what is lost; a launcher sends the second."""
        name = signal.Signals(number).name
        if not self._left:
            raise RunInterrupted(f"{name}: {self._what_is_given_up()}; continue with --resume")
        self._left -= 1
        if self:
            return
        self.signal_name = name
        if self._after_checkpoint:
            say(
                f"{name}: the checkpoint of step {self._step()} is saved; stopping after its {self._after_checkpoint}; "
                f"a {self._next} signal skips them"
            )
        else:
            lost = self._steps_lost()
            say(f"{name}: saving a checkpoint after this step; a {self._next} signal stops at once ({lost})")

    def _what_is_given_up(self) -> str:
        if self._after_checkpoint:
            return f"skipped the {self._after_checkpoint} of step {self._step()}; --resume makes them"
        return f"stopped at once; {self._steps_lost()}"

    def _steps_lost(self) -> str:
        complete = self._run.complete_steps()
        newest = complete[-1] if complete else 0
        lost = self._step() + 1 - newest  # the step in progress too
        since = f"since the checkpoint of step {newest}" if complete else "since the start"
        return f"{lost} step{'s' * (lost != 1)} {since} lost"


@contextmanager
def stop_on_signals(run: RunFolder, step: Callable[[], int], *, is_passed_on: bool = False) -> Iterator[StopRequest]:
    """Turn the first signal into a request to stop; the second stops at once, without a checkpoint.

    Args:
        run: The run folder.
        step: Returns the optimizer steps done.
        is_passed_on: Whether a launcher sends the second one by itself, so that the third stops at once.
    """
    request = StopRequest(run, step, is_passed_on=is_passed_on)
    with handling(request.handle):
        yield request
