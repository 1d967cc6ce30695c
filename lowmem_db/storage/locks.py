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
    """Keep other processes out of the block that name the same file; wait for one that is in it, and say so.

    On a disk that knows no locks nobody is kept out, and that is said: writes are whole all the same, work may be done
    twice.

    Args:
        path: The file of the lock. It stays: deleting it would let two processes in.

    Raises:
        StorageError: The file cannot be made.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
    except OSError as error:
        raise as_storage_error(error, path) from error
    except NotImplementedError:
        warn(f"{path.parent}: lies on a disk that knows no locks; runs that share it may do the same work twice")
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire(timeout=_SILENT_SECONDS)
    except Timeout:
        say(f"waiting for another run, which is making what this one needs too (lock: {path})")
        lock.acquire()
