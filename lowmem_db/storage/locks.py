"""Locks between processes that share a cache."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lowmem_db.console import say, warn
from lowmem_db.storage.atomic import as_storage_error

_SILENT_SECONDS = 1.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file in the block; wait if another process holds it, and say so.

    On a disk without locks, warn and continue: writes are still atomic, but work may be done twice.

    Args:
        path: The lock file. It is kept: deleting it would let two processes in.

    Raises:
        StorageError: The file cannot be created.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
    except OSError as error:
        raise as_storage_error(error, path) from error
    except NotImplementedError:
        warn(f"{path.parent}: is on a disk that does not support locks; runs that share it may do the same work twice")
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire(timeout=_SILENT_SECONDS)
    except Timeout:
        say(f"waiting for another run, which is making files that this one needs too (lock: {path})")
        lock.acquire()
