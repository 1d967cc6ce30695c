"""Differences between systems when writing files: syncing, renaming, modes and allowed names.

Windows cannot sync a read-only descriptor, cannot open folders, and cannot replace a file that a program has open. The
functions here do the same on every system, as far as possible.
"""

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PureWindowsPath

from lowmem_db.errors import StorageError

_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds: usually long enough for a virus scanner or sync client
_FOLDERS_ARE_NOT_SYNCED_HERE = {errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EISDIR}
_WINDOWS_PATH = 259
_LONGEST_BELOW = 100  # longest relative path in a run folder, including temporary names
_FORBIDDEN_ON_WINDOWS = '<>:"|?*'
_DEVICES = {
    "con", "prn", "aux", "nul", "conin$", "conout$",
    *(f"{name}{digit}" for name in ("com", "lpt") for digit in "123456789¹²³"),
}  # fmt: skip


def flush_file(path: Path) -> None:
    """Flush the bytes of a file to the disk."""
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, if the system can."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _FOLDERS_ARE_NOT_SYNCED_HERE:
            raise


def flush_tree(folder: Path) -> None:
    """Flush a folder with all its contents to the disk."""
    for path in sorted(folder.rglob("*")):
        (flush_folder if path.is_dir() else flush_file)(path)
    flush_folder(folder)


def replace_file(source: Path, target: Path) -> None:
    """Rename a file, replacing the target.

    Raises:
        StorageError: A program has the target open, or the folder is not writable.
    """
    _patiently(lambda: source.replace(target), target)


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder to an unused name.

    Raises:
        StorageError: A program has a file in it open, or the folder is not writable.
    """
    _patiently(lambda: source.rename(target), target)


def usual_mode(folder: Path) -> int:
    """Return the mode of a newly created file in a folder: what the umask leaves of 0666."""
    probe = folder / f".mode.{os.getpid()}.tmp"
    descriptor = os.open(probe, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def set_mode(path: Path, mode: int) -> None:
    """Set the mode of a file: safetensors writes files that only the owner can read, and a copy keeps its mode."""
    with suppress(PermissionError):  # file systems without modes refuse to set any
        path.chmod(mode)


def check_path(path: Path, field: str, *, system: str = os.name) -> None:
    """Refuse a folder in which this system cannot write a run, before anything is written.

    Args:
        path: The folder.
        field: The configuration field that named it, for messages.
        system: ``os.name``.

    Raises:
        StorageError: A name is reserved or too long.
    """
    problem = _problem_on_windows(path) if system == "nt" else None
    if problem:
        raise StorageError(f"{field}: {path} {problem}; choose another folder")


def is_too_long(path: Path, error: OSError, *, system: str = os.name) -> bool:
    """Return whether an error means that a path is too long; Windows reports a missing file then."""
    on_windows = system == "nt" and error.errno in {errno.ENOENT, errno.EINVAL}
    return error.errno == errno.ENAMETOOLONG or (on_windows and len(os.path.abspath(path)) > _WINDOWS_PATH)  # noqa: PTH100


def _problem_on_windows(path: Path) -> str | None:
    whole = PureWindowsPath(str(path))
    for name in whole.parts[1:] if whole.anchor else whole.parts:
        if name.split(".")[0].strip().lower() in _DEVICES:
            return f"contains {name!r}, which Windows reserves for a device"
        if forbidden := [sign for sign in name if sign in _FORBIDDEN_ON_WINDOWS or ord(sign) < 32]:
            return f"contains {forbidden[0]!r} in {name!r}, which Windows does not allow in names"
        if name not in {".", ".."} and name[-1] in ". ":
            return f"contains {name!r}: Windows does not allow names that end in a dot or a space"
    if len(str(path)) + _LONGEST_BELOW > _WINDOWS_PATH:
        return f"has {len(str(path))} characters; Windows allows {_WINDOWS_PATH - _LONGEST_BELOW} for a run folder"
    return None


def _patiently(rename: Callable[[], object], target: Path) -> None:
    """Rename, and try again for a while if a program has a file open."""
    for wait in (*_WAITS, None):
        try:
            rename()
        except PermissionError as error:
            if wait is None or not os.access(target.parent, os.W_OK):
                raise _as_busy(error, target) from error
            time.sleep(wait)
        else:
            return


def _as_busy(error: PermissionError, target: Path) -> StorageError:
    return StorageError(
        f"{target}: cannot be replaced ({os.strerror(error.errno or errno.EACCES)}): a program has it open (a viewer, "
        "a virus scanner, OneDrive), or the folder is not writable; close the program or check the folder's "
        "permissions, then run the same command again"
    )
