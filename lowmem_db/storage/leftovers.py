"""Temporary files that killed processes left behind: their names, and when they may be deleted.

A write goes to ``.NAME.PID.tmp`` beside its target, and safetensors writes to ``.tmpXXXXXX`` beside that. Such an entry
is deleted only if it belongs to this user, the process in its name is gone, and it has not been touched for a while:
the process may be running on another machine that shares the disk.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

IDLE_SECONDS = 600.0
"""How long an entry must be untouched before it counts as left behind."""

_STARTED = time.time()
_LONGEST_NAME = 120
_OURS = re.compile(r"\..+?\.(?P<pid>\d+)(?:\.old)?\.tmp")
_FOLDER_OF_OLDER_VERSIONS = re.compile(r"\..+?\.tmp")
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


def temporary_name(path: Path) -> str:
    """Return the name of the temporary file that this process writes for ``path``."""
    return f".{_stem(path)}.{os.getpid()}.tmp"


def sweep(root: Path, *, idle_seconds: float = IDLE_SECONDS) -> list[Path]:
    """Delete what dead processes left behind anywhere below a folder; return what was deleted.

    Args:
        root: The folder; it need not exist.
        idle_seconds: How long an entry must be untouched; 0 if nobody else can be writing. The files of safetensors
            name no process, so they must always be untouched for ``IDLE_SECONDS``.
    """
    return _delete(_leftovers(root), idle_seconds)


def sweep_writes_of(path: Path) -> list[Path]:
    """Delete what dead processes left of a write to ``path``; return what was deleted."""
    name = re.compile(re.escape(f".{_stem(path)}") + r"(?:\.\d+)?(?:\.old)?\.tmp")
    return _delete((entry for entry in _entries(path.parent) if name.fullmatch(entry.name)), 0.0)


def _stem(path: Path) -> str:
    """Return the name, shortened so that the temporary name is not too long."""
    return os.fsencode(path.name)[:_LONGEST_NAME].decode("utf-8", errors="ignore")


def _leftovers(folder: Path) -> Iterator[Path]:
    for entry in _entries(folder):
        is_folder = entry.is_dir() and not entry.is_symlink()
        names = (_OURS, _OF_SAFETENSORS, *(_FOLDER_OF_OLDER_VERSIONS,) * is_folder)
        if any(name.fullmatch(entry.name) for name in names):
            yield entry
        elif is_folder:
            yield from _leftovers(entry)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # missing, or not readable
        return []


def _delete(found: Iterator[Path], idle_seconds: float) -> list[Path]:
    gone = [entry for entry in found if _is_left_behind(entry, idle_seconds)]
    for entry in gone:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):  # another process swept it first, or it is open on Windows
                entry.unlink()
    return gone


def _is_left_behind(entry: Path, idle_seconds: float) -> bool:
    try:
        found = entry.lstat()
        touched = max([found.st_mtime, *(file.lstat().st_mtime for file in entry.rglob("*"))])
    except OSError:  # it is being renamed or deleted now
        return False
    is_own = os.name == "nt" or found.st_uid == os.getuid()
    needed = IDLE_SECONDS if _OF_SAFETENSORS.fullmatch(entry.name) else idle_seconds
    return is_own and not _has_live_writer(entry.name, touched) and time.time() - touched >= needed


def _has_live_writer(name: str, touched: float) -> bool:
    """Return whether the process in a name is alive; this one counts only if it touched the file."""
    named = _OURS.fullmatch(name)
    if named is None:
        return False
    pid = int(named["pid"])
    return touched >= _STARTED if pid == os.getpid() else _is_alive(pid)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 would end the process
        return _is_alive_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_alive_on_windows(pid: int) -> bool:
    import ctypes

    windows = ctypes.windll.kernel32  # pyright: ignore[reportAttributeAccessIssue]
    handle = windows.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if handle:
        windows.CloseHandle(handle)
    return bool(handle)
