"""Several processes on one fresh cache: an entry is made once, and nobody reads half of it."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from lowmem_db.errors import StorageError
from lowmem_db.storage import locks
from lowmem_db.storage.locks import locked
from lowmem_db.storage.tensors import TensorStore

KEYS = [f"{number:02x}cd" for number in range(6)]


def fill(root: Path, start: object, made: object) -> None:
    """Ask for every entry; say which were made here, and what was read."""
    store = TensorStore(root)
    start.wait(60)

    def make(key: str) -> dict[str, Tensor]:
        made.put(key)
        return {"value": torch.full((50_000,), float(KEYS.index(key)))}

    for key in KEYS:
        found = store.read_or_make(key, lambda key=key: make(key))
        assert torch.equal(found["value"], torch.full((50_000,), float(KEYS.index(key))))


def test_an_entry_is_made_once_by_all_processes_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, made = context.Barrier(3), context.Queue()
    processes = [context.Process(target=fill, args=(tmp_path, start, made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(made.get(timeout=10) for _ in KEYS) == KEYS
    assert made.empty()


def test_damaged_entry_is_made_anew(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.write("abcd", {"a": torch.ones(1)})
    store.path("abcd").write_bytes(b"half")
    assert torch.equal(store.read_or_make("abcd", lambda: {"a": torch.zeros(1)})["a"], torch.zeros(1))
    assert torch.equal(store.read_or_make("abcd", lambda: pytest.fail("made again"))["a"], torch.zeros(1))


def test_failure_lets_the_next_one_in(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    with pytest.raises(ZeroDivisionError):
        store.read_or_make("abcd", lambda: {"a": torch.ones(1 // 0)})
    assert store.read_or_make("abcd", lambda: {"a": torch.ones(1)})


def test_waiting_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_SILENT_SECONDS", 0.01)
    other = FileLock(tmp_path / "lock")
    other.acquire()
    said = []
    monkeypatch.setattr(locks, "say", lambda message: (other.release(), said.append(message)))
    with locked(tmp_path / "lock"):
        assert said == [
            f"waiting for another run, which is making files that this one needs too (lock: {tmp_path / 'lock'})"
        ]


def test_disk_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with locked(tmp_path / "lock"):
        assert "is on a disk that does not support locks" in capfd.readouterr().err


def test_lock_that_cannot_be_made_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"), locked(tmp_path / "file" / "lock"):
        pass
