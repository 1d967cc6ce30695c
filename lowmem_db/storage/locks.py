"""Locks between processes that share a cache."""

from collections.abc import Callable, Iterable, Iterator
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


def share_out_work(pieces: Iterable[tuple[Path, Callable[[], object]]]) -> None:
    """Do pieces of work that other processes may do too: first those that are free, then those that were taken.

    Args:
        pieces: The lock file of each piece, and a function that does what is missing of it by then.

    Raises:
        StorageError: A lock file cannot be created.
    """
    taken = []
    for path, do in pieces:
        if not _do_if_free(path, do):
            taken.append((path, do))
    for path, do in taken:
        with locked(path):
            do()


def _do_if_free(path: Path, do: Callable[[], object]) -> bool:
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError as error:
        raise as_storage_error(error, path) from error
    except NotImplementedError:  # told by `locked`
        return False
    try:
        do()
    finally:
        with suppress(OSError):
            lock.release()
    return True


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire(timeout=_SILENT_SECONDS)
    except Timeout:
        say(f"waiting for another run, which is making files that this one needs too (lock: {path})")
        lock.acquire()
