"""Writes that either happen whole or not at all, also when the process is killed or the disk fills up."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lowmem_db.errors import StorageError


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, flush it, and rename it to ``path``.

    Raises:
        StorageError: The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise as_storage_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder beside ``path``, flush it, and rename it to ``path``.

    A folder that stands at ``path`` is replaced.

    Raises:
        StorageError: The disk is full; what stood at ``path`` still stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for file in sorted(temporary.rglob("*")):
            _flush(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise as_storage_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_storage_error(error: OSError, path: Path) -> StorageError:
    """Say in one line what went wrong while ``path`` was written."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StorageError(f"{path}: the disk is full; free some space, then continue with --resume")
    return StorageError(f"{path}: cannot be written ({error.strerror or error}); check the folder and its permissions")


def _flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    with suppress(PermissionError):  # folders cannot be opened on Windows
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
