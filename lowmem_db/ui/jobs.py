"""Commands of this package in processes of their own, and how far they are."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from lowmem_db.errors import LowmemDbError
from lowmem_db.storage.run_folder import read_json
from lowmem_db.ui.job import COMMANDS, ENDED, LOCK, LOG, STARTED, STOP, output_file

_STARTING_SECONDS = 30.0
_SHOWN_BYTES = 20_000
_INTERRUPTED = 130
_processes: list[subprocess.Popen[Any]] = []


@dataclass(frozen=True)
class Job:
    """How far a job is.

    Attributes:
        state: Whether it runs, and how it ended.
        message: Why it failed.
        log: The end of what it said.
    """

    state: Literal["none", "running", "done", "stopped", "failed"]
    message: str = ""
    log: str = ""

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self.state == "running"


def start(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Start commands, one after the other until one fails; what an earlier job left in the folder is deleted.

    Args:
        folder: Where output, log and result are kept.
        commands: Arguments of ``lowmem-db``.

    Raises:
        LowmemDbError: A job runs there already.
    """
    if job_in(folder).is_running:
        raise LowmemDbError("this runs already; wait for it, or stop it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMANDS).write_text(json.dumps([list(command) for command in commands]), encoding="utf-8")
    _processes[:] = [process for process in _processes if process.poll() is None]
    with (folder / LOG).open("ab") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "lowmem_db.ui.job", str(folder.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            **_on_its_own(),
        )
    _processes.append(started)  # so that it is waited for


def stop(folder: Path) -> None:
    """Ask a job to stop; what it has done so far is kept."""
    if job_in(folder).is_running:
        (folder / STOP).touch()


def job_in(folder: Path) -> Job:
    """Return how far the job in a folder is."""
    commands = folder / COMMANDS
    if not commands.is_file():
        return Job("none")
    # In this order: a job makes STARTED once it holds the lock, and writes ENDED before it lets go of it.
    has_started = (folder / STARTED).exists()
    is_locked = _is_locked(folder / LOCK)
    ended, log = read_json(folder / ENDED), _end_of(folder / LOG)
    if not isinstance(ended, dict):
        is_new = time.time() - commands.stat().st_mtime < _STARTING_SECONDS
        if is_locked or (is_new and not has_started):
            return Job("running", log=log)
        return Job("failed", "it was killed", log)
    if ended.get("code") == 0:
        return Job("done", log=log)
    if (folder / STOP).exists() or ended.get("code") == _INTERRUPTED:
        return Job("stopped", log=log)
    return Job("failed", _reason(log), log)


def output_of(folder: Path, number: int = 0) -> Any:
    """Return the standard output of a command as JSON, or None."""
    return read_json(output_file(folder, number))


def _on_its_own() -> dict[str, Any]:
    """Return what keeps a process alive when its parent and the terminal go."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def _is_locked(file: Path) -> bool:
    if not file.exists():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _end_of(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _SHOWN_BYTES))
        return opened.read().decode("utf-8", errors="replace")


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return "\n".join(errors) or (lines[-1] if lines else "it ended without a word")
