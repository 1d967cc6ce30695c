"""What dead processes left is deleted, and nothing that a live one is writing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem_db.storage import leftovers
from lowmem_db.storage.leftovers import IDLE_SECONDS, sweep, sweep_writes_of, temporary_name


@pytest.fixture(scope="module")
def dead() -> int:
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(path: Path, seconds: float) -> Path:
    """Write a file that was last touched so long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def make(path: Path, seconds: float) -> Path:
    """Make a folder that was last touched so long ago."""
    path.mkdir(parents=True)
    os.utime(path, (time.time() - seconds,) * 2)
    return path


OLD = IDLE_SECONDS + 60


def test_files_and_folders_of_dead_processes_are_deleted(tmp_path: Path, dead: int) -> None:
    gone = [
        write(tmp_path / "latents" / "ab" / f".abcd.safetensors.{dead}.tmp", OLD),
        write(tmp_path / f".config.yaml.{dead}.tmp", OLD),
        make(tmp_path / "checkpoints" / f".step-000004.{dead}.tmp", OLD),
        make(tmp_path / "checkpoints" / f".step-000004.{dead}.old.tmp", OLD),
        make(tmp_path / "checkpoints" / ".step-000003.tmp", OLD),
    ]
    gone.append(write(tmp_path / "latents" / ".tmp9YWx3E", OLD))
    assert set(sweep(tmp_path)) == set(gone)
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_what_a_live_process_writes_stays(tmp_path: Path) -> None:
    parent = write(tmp_path / f".config.yaml.{os.getppid()}.tmp", OLD)
    own = write(tmp_path / temporary_name(Path("config.yaml")), 0)
    assert sweep(tmp_path) == []
    assert sweep(tmp_path, idle_seconds=0.0) == []
    assert parent.exists()
    assert own.exists()


def test_what_was_touched_of_late_stays_unless_nobody_else_can_write(tmp_path: Path, dead: int) -> None:
    """On a shared disk, the process may live on another machine."""
    recent = write(tmp_path / f".config.yaml.{dead}.tmp", 1)
    nameless = write(tmp_path / ".tmp9YWx3E", 1)
    folder = make(tmp_path / f".step-000004.{dead}.tmp", OLD)
    (folder / "unet.safetensors").touch()
    os.utime(folder, (time.time() - OLD,) * 2)
    assert sweep(tmp_path) == []
    assert sweep(tmp_path, idle_seconds=0.0) == [recent, folder]
    assert nameless.exists()


def test_an_earlier_process_of_the_same_number_is_dead(tmp_path: Path) -> None:
    """In a container, every run may be process 1."""
    left = write(tmp_path / temporary_name(Path("config.yaml")), OLD + time.time() - leftovers._STARTED)
    assert sweep(tmp_path) == [left]


def test_what_belongs_to_somebody_else_stays(tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = write(tmp_path / f".config.yaml.{dead}.tmp", OLD)
    monkeypatch.setattr(os, "getuid", lambda: left.stat().st_uid + 1)
    assert sweep(tmp_path) == []


def test_other_names_stay(tmp_path: Path, dead: int) -> None:
    for name in (".DS_Store", "a.tmp", f"config.yaml.{dead}.tmp", ".lock", ".tmp", ".tmpfile", ".notes.tmp"):
        write(tmp_path / name, OLD)
    assert sweep(tmp_path) == []
    assert sweep(tmp_path / "nothing") == []


def test_links_are_not_followed(tmp_path: Path, dead: int) -> None:
    outside = write(tmp_path / "outside" / f".a.b.{dead}.tmp", OLD)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "link").symlink_to(outside.parent)
    assert sweep(tmp_path / "cache") == []
    assert outside.exists()


def test_writes_of_one_target_alone(tmp_path: Path, dead: int) -> None:
    left = make(tmp_path / f".step-1.{dead}.tmp", 0)
    other = make(tmp_path / f".step-10.{dead}.tmp", 0)
    assert sweep_writes_of(tmp_path / "step-1") == [left]
    assert other.exists()
