"""What a run is asked to do while it trains, and what it is doing: small files in its folder.

They work from any process that reaches the folder, on every system, and need no process number.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from lowmem_db import console
from lowmem_db.errors import StorageError
from lowmem_db.storage.run_folder import RunFolder, read_json

Request = Literal["stop", "save", "sample"]
"""Save and stop; save and go on; save, draw samples and go on."""
REQUESTS: tuple[Request, ...] = get_args(Request)
_EVERY_SECONDS = 0.5


def ask(run: RunFolder, request: Request) -> None:
    """Ask a run for something; it does it after the step in progress.

    Raises:
        StorageError: The folder cannot be written.
    """
    try:
        _file(run, request).parent.mkdir(exist_ok=True)
        _file(run, request).touch()
    except OSError as error:
        raise StorageError(
            f"{run.root}: cannot be written ({error}), so the run cannot be asked to {request}"
        ) from error


def asked(run: RunFolder) -> set[Request]:
    """Return what a run is asked for and has not done yet."""
    return {request for request in REQUESTS if _file(run, request).exists()}


def take(run: RunFolder) -> set[Request]:
    """Return what a run is asked for, and forget it."""
    found = asked(run)
    for request in found:
        _file(run, request).unlink(missing_ok=True)
    return found


@contextmanager
def progress_told(run: RunFolder) -> Iterator[None]:
    """Return a context in which what a progress bar shows is also in ``progress.json``."""
    file = progress_file(run)
    last = 0.0

    def tell(description: str, done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > _EVERY_SECONDS:
            last = now
            _replace(file, json.dumps({"doing": description, "done": done, "total": total}))

    with console.listening(tell):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def progress_of(run: RunFolder) -> dict[str, Any] | None:
    """Return what a run does besides training: ``doing``, ``done`` and ``total``; None if it does nothing else."""
    found = read_json(progress_file(run))
    return found if isinstance(found, dict) and {"doing", "done", "total"} <= found.keys() else None


def progress_file(run: RunFolder) -> Path:
    """Return the file of what a run does besides training."""
    return run.root / "progress.json"


def _file(run: RunFolder, request: Request) -> Path:
    return run.root / "requests" / request


def _replace(file: Path, text: str) -> None:
    """Write a file that nobody misses if it is lost."""
    temporary = file.with_suffix(".new")
    with suppress(OSError):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
