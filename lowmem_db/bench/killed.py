"""Processes that train until they are killed: ``python -m lowmem_db.bench.killed``.

To import what they need takes longer than their steps, so they are started ahead and wait for a line that says what to
train.
"""

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lowmem_db.bench.setting import Setting
from lowmem_db.bench.steps import Steps
from lowmem_db.bench.strategies import TECHNIQUES, strategy
from lowmem_db.storage.run_folder import RunFolder

Process = subprocess.Popen[str]
_NUM_AHEAD = 2
_NUM_SAVED = 2  # checkpoints before the kill
_MOST_STEPS = 100  # by which it ends if nobody kills it
_POLL_SECONDS = 0.02
_LONGEST_SECONDS = 120.0  # until then a process has saved something, or hangs


@contextmanager
def started_ahead(count: int) -> Iterator[Callable[[], Process]]:
    """Return a context with a function that hands out processes which wait for work; those left over are killed.

    Args:
        count: How many can be asked for; two of those to come are started ahead.
    """
    waiting: deque[Process] = deque()
    num_started = 0

    def take() -> Process:
        nonlocal num_started
        while num_started < count and len(waiting) <= _NUM_AHEAD:
            waiting.append(_start())
            num_started += 1
        return waiting.popleft()

    try:
        yield take
    finally:
        for process in waiting:
            _end(process)


def _start() -> Process:
    command, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)


def _end(process: Process) -> str:
    """Kill a process, and return its last words."""
    process.kill()
    _, said = process.communicate()
    return (said.strip().splitlines() or ["nothing"])[-1]


def kill_in_its_steps(process: Process, setting: Setting, technique: str, run: RunFolder) -> None:
    """Let a process that waits train, and kill it when it has saved two checkpoints and goes on.

    Args:
        process: From :func:`started_ahead`.
        setting: Where it steps.
        technique: The name of a technique.
        run: Its checkpoints.

    Raises:
        RuntimeError: It ended before, or hangs; the message has its last words.
    """
    latest = time.monotonic() + _LONGEST_SECONDS
    try:
        with suppress(BrokenPipeError):  # it has ended already, and says why below
            assert process.stdin is not None, "it is told through its standard input"
            process.stdin.write(json.dumps([str(setting.device), technique, str(run.root)]) + "\n")
            process.stdin.flush()
        while (num_saved := len(run.complete_steps())) < _NUM_SAVED and process.poll() is None:
            if time.monotonic() > latest:
                break
            time.sleep(_POLL_SECONDS)
        ended = process.poll()
    finally:
        last = _end(process)
    if ended is not None:
        raise RuntimeError(f"the process to be killed ended by itself with exit code {ended}, and said: {last}")
    if num_saved < _NUM_SAVED:
        raise RuntimeError(f"the process to be killed saved nothing in {_LONGEST_SECONDS:.0f} s, and said: {last}")


def _step_and_save(device: str, technique: str, folder: str) -> None:
    setting = Setting(torch.device(device), tiny=True)
    step = Steps(strategy(setting, technique, TECHNIQUES[technique]), setting.device)
    while step.number < _MOST_STEPS:
        step()
        step.save(RunFolder(Path(folder)))


if __name__ == "__main__":
    if line := sys.stdin.readline():  # nothing comes if who started it is gone
        _step_and_save(*json.loads(line))
