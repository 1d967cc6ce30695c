"""A write happens whole or not at all, whatever fails in the middle of it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lowmem_db.errors import StorageError
from lowmem_db.storage import atomic
from lowmem_db.storage.atomic import write_file, write_folder, write_text
from lowmem_db.storage.leftovers import temporary_name

DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DISK_FULL_AS_SAFETENSORS_SAYS_IT = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


def fail(error: BaseException) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


def break_write(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "new" if path.is_dir() else path).write_text("half")
        raise error

    return write


def break_flush(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Callable[[Path], None]:
    for name in ("flush_file", "flush_tree"):
        monkeypatch.setattr(atomic, name, fail(error))
    return write_new


def break_rename(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Callable[[Path], None]:
    monkeypatch.setattr(Path, "replace", fail(error))
    rename = Path.rename

    def rename_old_only(self: Path, target: Path) -> Path:
        if self.name == temporary_name(Path("target")):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_old_only)
    return write_new


def write_new(path: Path) -> None:
    (path / "new" if path.is_dir() else path).write_text("new")


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.write_text("old")
    return path


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    (path / "old").write_text("old")
    return path


@pytest.mark.parametrize("break_", [break_write, break_flush, break_rename])
@pytest.mark.parametrize("error", [DISK_FULL, RuntimeError("a bug"), KeyboardInterrupt()], ids=["full", "bug", "stop"])
def test_failed_write_leaves_the_old_file(
    monkeypatch: pytest.MonkeyPatch, old_file: Path, break_: Callable, error: BaseException
) -> None:
    write = break_(monkeypatch, error)
    with pytest.raises(StorageError if error is DISK_FULL else type(error)):
        write_file(old_file, write)
    monkeypatch.undo()
    assert old_file.read_text() == "old"
    assert [file.name for file in old_file.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("break_", [break_write, break_flush, break_rename])
@pytest.mark.parametrize("error", [DISK_FULL, RuntimeError("a bug"), KeyboardInterrupt()], ids=["full", "bug", "stop"])
def test_failed_write_leaves_the_old_folder(
    monkeypatch: pytest.MonkeyPatch, old_folder: Path, break_: Callable, error: BaseException
) -> None:
    write = break_(monkeypatch, error)
    with pytest.raises(StorageError if error is DISK_FULL else type(error)):
        write_folder(old_folder, write)
    monkeypatch.undo()
    assert [(file.name, file.read_text()) for file in old_folder.iterdir()] == [("old", "old")]
    assert [file.name for file in old_folder.parent.iterdir()] == ["target"]


def test_new_folder_replaces_the_old_one(old_folder: Path) -> None:
    write_folder(old_folder, write_new)
    assert [(file.name, file.read_text()) for file in old_folder.iterdir()] == [("new", "new")]
    assert [file.name for file in old_folder.parent.iterdir()] == ["target"]


def test_new_file_replaces_the_old_one(old_file: Path) -> None:
    write_text(old_file, "süß")
    assert old_file.read_text(encoding="utf-8") == "süß"


def test_what_a_killed_write_left_is_cleared(old_folder: Path) -> None:
    for name in (".target.tmp", ".target.old.tmp"):
        (old_folder.parent / name).mkdir()
        (old_folder.parent / name / "half").touch()
    write_folder(old_folder, write_new)
    assert [file.name for file in old_folder.iterdir()] == ["new"]
    assert [file.name for file in old_folder.parent.iterdir()] == ["target"]


def test_parents_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b", "text")
    write_folder(tmp_path / "c" / "d", write_new)
    assert (tmp_path / "a" / "b").read_text() == "text"
    assert (tmp_path / "c" / "d" / "new").read_text() == "new"


@pytest.mark.parametrize("error", [DISK_FULL, DISK_FULL_AS_SAFETENSORS_SAYS_IT])
def test_full_disk_is_said_with_the_way_out(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StorageError, match=r"target: the disk is full; free some space, then run the same command"):
        write_file(tmp_path / "target", fail(error))


def test_full_disk_names_the_file_where_it_was_going_to_be(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as full:
        write_folder(tmp_path / "step-1", lambda folder: write_file(folder / "unet", fail(DISK_FULL)))
    assert str(full.value).startswith(f"{tmp_path / 'step-1' / 'unet'}: the disk is full")


def test_other_errors_of_the_system_are_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"target: cannot be written \(Read-only file system\); check the folder"):
        write_file(tmp_path / "target", fail(OSError(errno.EROFS, "Read-only file system")))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        write_text(tmp_path / "file" / "below", "text")


def test_everything_is_flushed_before_the_rename(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events = []
    fsync, rename = os.fsync, Path.rename
    names = {}
    open_ = os.open

    def opening(path: Path, *arguments: int) -> int:
        descriptor = open_(path, *arguments)
        names[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (events.append(f"flush {names[descriptor]}"), fsync(descriptor))
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(f"rename to {b.name}"), rename(a, b))[1])

    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").touch()

    write_folder(tmp_path / "target", write)
    temporary = temporary_name(tmp_path / "target")
    assert events == [
        "flush inner", "flush file", f"flush {temporary}", "rename to target", f"flush {tmp_path.name}",
    ]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    """safetensors writes 0600, and a copy has the mode of its original."""

    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        save_file({"a": torch.zeros(1)}, folder / "inner" / "a.safetensors")
        (folder / "copied").touch(0o400)

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "folder", write)
        write_file(tmp_path / "file", lambda path: save_file({"a": torch.zeros(1)}, path))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        name: oct(0o666 & ~umask) for name in ("a.safetensors", "copied", "file")
    }


def test_lines_end_in_a_line_feed_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "linesep", "\r\n")
    write_text(tmp_path / "text", "one\ntwo\n")
    assert (tmp_path / "text").read_bytes() == b"one\ntwo\n"


def test_a_name_that_leaves_no_room_for_a_temporary_one_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "猫" * 85):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_names_that_are_too_long_are_said(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 256), tmp_path / "/".join(["x" * 200] * 30) / "file"):
        with pytest.raises(StorageError, match=r"too long for this system .* choose a shorter one"):
            write_text(path, "text")
