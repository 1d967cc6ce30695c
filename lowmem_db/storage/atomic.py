"""Writes that happen completely or not at all, even if the process is killed or the disk fills up."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from lowmem_db.errors import DiskFullError, StorageError
from lowmem_db.storage.disk import (
    flush_file,
    flush_folder,
    flush_tree,
    is_too_long,
    rename_folder,
    replace_file,
    set_mode,
    usual_mode,
)
from lowmem_db.storage.leftovers import sweep_writes_of, temporary_name

_FAILURES = (OSError, SafetensorError)
_IS_A_FILE = {errno.EEXIST, errno.ENOTDIR}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, flush it, and rename it to ``path``.

    Raises:
        StorageError: The disk is full.
    """
    temporary = path.with_name(temporary_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = usual_mode(path.parent)
        write(temporary)
        set_mode(temporary, mode)
        flush_file(temporary)
        replace_file(temporary, path)
        flush_folder(path.parent)
    except _FAILURES as error:
        raise as_storage_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; its lines end in a line feed on every system."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder beside ``path``, flush it, and rename it to ``path``.

    An existing folder at ``path`` is replaced.

    Raises:
        StorageError: The disk is full; an existing folder at ``path`` is untouched.
    """
    temporary = path.with_name(temporary_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_writes_of(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        mode = usual_mode(path.parent)
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                set_mode(file, mode)
        flush_tree(temporary)
        _replace_folder(path, temporary)
        flush_folder(path.parent)
    except StorageError as error:  # for a file in it: name the path that the user knows
        raise type(error)(str(error).replace(str(temporary), str(path))) from error
    except _FAILURES as error:
        raise as_storage_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_storage_error(error: OSError | SafetensorError, path: Path) -> StorageError:
    """Say in one line what went wrong while ``path`` was written."""
    number = error.errno if isinstance(error, OSError) else _number_in(str(error))
    if number in _DISK_FULL:
        return DiskFullError(f"{path}: the disk is full; free some space, then run the same command again")
    if isinstance(error, OSError) and is_too_long(path, error):
        return StorageError(
            f"{path}: the name or the path is too long for this system ({len(str(path))} characters); choose a shorter "
            "one"
        )
    if number in _IS_A_FILE:
        return StorageError(
            f"{path}: cannot be written, because a file is in its place, or in that of a folder above; choose another "
            "one"
        )
    reason = os.strerror(number) if number else str(error)
    return StorageError(f"{path}: cannot be written ({reason}); check the folder and its permissions")


def _number_in(message: str) -> int | None:
    """Return the system error number in a message of safetensors, such as 28 in ``(os error 28)``."""
    found = re.search(r"os error (\d+)", message)
    return int(found[1]) if found else None


def _replace_folder(path: Path, new: Path) -> None:
    """Rename ``new`` to ``path``; an existing folder is deleted afterwards, or restored if the renaming fails."""
    if not path.exists():
        rename_folder(new, path)
        return
    old = new.with_name(new.name.removesuffix(".tmp") + ".old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    rename_folder(path, old)
    try:
        rename_folder(new, path)
    except BaseException:
        rename_folder(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
