"""The same writes under the refusals of Windows, which are imitated here."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_db.errors import StorageError
from lowmem_db.storage import disk
from lowmem_db.storage.atomic import write_file, write_folder, write_text
from lowmem_db.storage.disk import check_path, is_too_long
from lowmem_db.storage.run_folder import RunFolder


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse what Windows refuses: to open a folder, and to sync what is open for reading alone."""
    open_, fsync = os.open, os.fsync

    def opening(path: os.PathLike[str], flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_(path, flags, mode, dir_fd=dir_fd)

    def syncing(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(disk, "_WAITS", (0.0,) * 5)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as there


def busy(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[int]:
    """Let a rename fail so many times, as it does while a program has the file open."""
    rename: Callable[[Path, Path], Path] = getattr(Path, name)
    failed: list[int] = []

    def renaming(self: Path, target: Path) -> Path:
        if len(failed) < times:
            failed.append(1)
            raise PermissionError(errno.EACCES, "Access is denied")
        return rename(self, target)

    monkeypatch.setattr(Path, name, renaming)
    return failed


@pytest.mark.usefixtures("windows")
def test_files_and_folders_are_written(tmp_path: Path) -> None:
    write_text(tmp_path / "run" / "config.yaml", "seed: 1")
    run = RunFolder(tmp_path / "run")
    with run.locked():
        run.write_checkpoint(3, lambda folder: (folder / "state").write_text("state") and None)
    assert run.complete_steps() == [3]


@pytest.mark.usefixtures("windows")
def test_a_file_that_is_open_for_a_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    failed = busy(monkeypatch, "replace", 4)
    write_text(tmp_path / "file", "new")
    assert len(failed) == 4
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("name", ["replace", "rename"])
def test_a_file_that_stays_open_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    failed = busy(monkeypatch, name, 99)
    write, content = {"replace": (write_file, Path.touch), "rename": (write_folder, lambda _: None)}[name]
    with pytest.raises(StorageError, match=r"target: cannot be replaced .*a program has it open .*close the program"):
        write(tmp_path / "target", content)
    assert len(failed) == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("windows")
def test_a_folder_that_is_open_for_a_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "target", lambda folder: (folder / "old").touch())
    busy(monkeypatch, "rename", 2)
    write_folder(tmp_path / "target", lambda folder: (folder / "new").touch())
    assert [file.name for file in tmp_path.rglob("*")] == ["target", "new"]


def test_nobody_waits_for_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = busy(monkeypatch, "replace", 99)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match="the folder is not writable"):
        write_text(tmp_path / "target", "new")
    assert len(failed) == 1


def test_an_error_of_the_disk_while_it_is_synced_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def syncing(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", syncing)
    with pytest.raises(StorageError, match="Input/output error"):
        write_file(tmp_path / "target", lambda path: path.touch())
    with pytest.raises(OSError, match="Input/output error"):
        disk.flush_folder(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "runs/con", "runs/CON", "runs/nul.txt", "aux/dog", "runs/lpt1", "runs/a:b", "runs/what?", 'runs/"dog"',
        "runs/a|b", "runs/dog.", "runs/dog ", "runs/a\tb", "C:/runs/prn", "runs/" + "x" * 200,
    ],
)  # fmt: skip
def test_a_folder_that_windows_cannot_make_is_refused(path: str) -> None:
    with pytest.raises(StorageError, match=r"^output_dir: .*Windows.*; choose another folder$"):
        check_path(Path(path), "output_dir", system="nt")
    check_path(Path(path), "output_dir", system="posix")


@pytest.mark.parametrize(
    "path", ["runs/dog", "C:/runs/dog", "../runs/console", "//server/share/runs", "./läuft/犬", "."]
)
def test_a_folder_that_windows_can_make_is_allowed(path: str) -> None:
    check_path(Path(path), "output_dir", system="nt")


def test_windows_says_of_a_long_path_that_it_is_missing() -> None:
    missing = OSError(errno.ENOENT, "No such file or directory")
    assert is_too_long(Path("x" * 300), missing, system="nt")
    assert not is_too_long(Path("x" * 300), missing, system="posix")
    assert not is_too_long(Path("x"), missing, system="nt")
