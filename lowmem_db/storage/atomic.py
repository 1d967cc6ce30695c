"""Writes that either happen whole or not at all, also when the process is killed or the disk fills up."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from lowmem_db.errors import StorageError

_FAILURES = (OSError, SafetensorError)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, flush it, and rename it to ``path``.

    Raises:
        StorageError: The disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except _FAILURES as error:
        raise as_storage_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder beside ``path``, flush it, and rename it to ``path``.

    A folder that stands at ``path`` is replaced.

    Raises:
        StorageError: The disk is full; what stood at ``path`` still stands.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in sorted(temporary.rglob("*")):
            _flush(file)
        _replace_folder(path, temporary)
        _flush(path.parent)
    except StorageError as error:  # of a file in it: name the place the user knows
        raise StorageError(str(error).replace(str(temporary), str(path))) from error
    except _FAILURES as error:
        raise as_storage_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_storage_error(error: OSError | SafetensorError, path: Path) -> StorageError:
    """Say in one line what went wrong while ``path`` was written."""
    number = error.errno if isinstance(error, OSError) else _number_in(str(error))
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return StorageError(f"{path}: the disk is full; free some space, then run the same command again")
    reason = os.strerror(number) if number else str(error)
    return StorageError(f"{path}: cannot be written ({reason}); check the folder and its permissions")


def _number_in(message: str) -> int | None:
    """Return the number of the system's error in safetensors' message, such as 28 in ``(os error 28)``."""
    found = re.search(r"os error (\d+)", message)
    return int(found[1]) if found else None


def _replace_folder(path: Path, new: Path) -> None:
    """Rename ``new`` to ``path``; what stands there is deleted afterwards, and put back where the renaming fails."""
    old = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if not path.exists():
        new.rename(path)
        return
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    with suppress(PermissionError):  # folders cannot be opened on Windows
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
