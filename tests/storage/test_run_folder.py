"""The run folder: which checkpoints are complete, what is pruned, and who may write."""

import errno
import json
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from lowmem_db.errors import CheckpointError, StorageError
from lowmem_db.storage import run_folder
from lowmem_db.storage.disk import check_path
from lowmem_db.storage.run_folder import MARKER, RunFolder, append_row, read_json, read_rows, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def write_checkpoint(run: RunFolder, step: int, text: str = "state") -> None:
    run.write_checkpoint(step, lambda folder: (folder / "state").write_text(text) and None)


def test_checkpoint_is_complete_when_its_marker_is_there(run: RunFolder) -> None:
    assert run.complete_steps() == []
    for step in (500, 10, 1000000):
        write_checkpoint(run, step)
    assert run.complete_steps() == [10, 500, 1000000]
    (run.checkpoint_dir(500) / MARKER).unlink()
    assert run.complete_steps() == [10, 1000000]


def test_what_is_no_checkpoint_is_not_taken_for_one(run: RunFolder) -> None:
    for name in ("step-x", "step-5.bak", ".step-000005.tmp", "mine"):
        (run.checkpoints_dir / name).mkdir(parents=True)
        (run.checkpoints_dir / name / MARKER).touch()
    (run.checkpoints_dir / "step-7").touch()
    assert run.complete_steps() == []


def test_failed_checkpoint_leaves_those_before(run: RunFolder) -> None:
    write_checkpoint(run, 1)

    def fail(folder: Path) -> None:
        (folder / "state").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"step-000002: the disk is full"):
        run.write_checkpoint(2, fail)
    assert run.complete_steps() == [1]
    assert [folder.name for folder in run.checkpoints_dir.iterdir()] == ["step-000001"]


def test_incomplete_checkpoint_is_written_anew_and_a_complete_one_is_kept(run: RunFolder) -> None:
    write_checkpoint(run, 3, "half")
    (run.checkpoint_dir(3) / MARKER).unlink()
    write_checkpoint(run, 3, "whole")
    write_checkpoint(run, 3, "again")
    assert (run.checkpoint_dir(3) / "state").read_text() == "whole"


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4]), (None, [1, 2, 3, 4])])
def test_pruning_keeps_the_newest(run: RunFolder, keep: int | None, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(run, step)
    run.prune_checkpoints(keep)
    assert run.complete_steps() == left


def test_pruning_counts_complete_checkpoints_alone(run: RunFolder) -> None:
    for step in (1, 2, 3):
        write_checkpoint(run, step)
    (run.checkpoint_dir(3) / MARKER).unlink()
    (run.checkpoints_dir / ".step-000004.tmp").mkdir()
    run.prune_checkpoints(1)
    assert [folder.name for folder in run.checkpoints_dir.iterdir()] == ["step-000002"]


def test_pruning_leaves_what_is_not_its_own(run: RunFolder) -> None:
    write_checkpoint(run, 1)
    write_checkpoint(run, 2)
    (run.checkpoints_dir / ".DS_Store").touch()
    (run.checkpoints_dir / "the best one").mkdir()
    run.prune_checkpoints(1)
    assert {entry.name for entry in run.checkpoints_dir.iterdir()} == {"step-000002", ".DS_Store", "the best one"}


def test_metrics_after_a_step_and_half_rows_are_dropped(run: RunFolder) -> None:
    rows = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3)]
    run.root.mkdir()
    run.metrics_file.write_bytes("".join(rows).encode() + b"\x00\x00\xff\n[]\n7\n" + b'{"step": 2, "lo')
    run.truncate_rows(2)
    assert run.metrics_file.read_text() == "".join(rows[:2])
    run.truncate_rows(0)
    assert run.metrics_file.read_text() == ""


def test_odd_rows_are_no_rows(run: RunFolder) -> None:
    run.root.mkdir()
    odd = ["[]", "7", "null", '{"step": "1"}', '{"step": null}', '{"step": true}', '{"step": 1.5}', "{", "[" * 50_000]
    run.metrics_file.write_text("\n".join([*odd, '{"step": 1}', "\x00", '{"st']))
    assert read_rows(run.metrics_file) == [{"step": 1}]
    run.truncate_rows(5)
    assert run.metrics_file.read_text() == '{"step": 1}\n'


def test_rows_are_on_the_disk_before_a_checkpoint_counts(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(run_folder, "flush_file", flushed.append)
    run.root.mkdir()
    append_row(run.metrics_file, {"step": 3})
    write_checkpoint(run, 3)
    assert flushed == [run.metrics_file]
    append_row(run.scores_file, {"step": 3})
    monkeypatch.setattr(run_folder, "flush_file", fail_to_flush)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written"):
        write_checkpoint(run, 4)
    assert run.complete_steps() == [3]


def fail_to_flush(file: Path) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_metrics_need_not_be_there(run: RunFolder) -> None:
    run.truncate_rows(2)
    assert not run.metrics_file.exists()


def hold(root: Path, held: object, done: object) -> None:
    with RunFolder(root).locked():
        held.set()
        done.wait(60)


def test_folder_of_another_process_is_refused(run: RunFolder) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(run.root, held, done))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(CheckpointError, match="is in use by another run; wait for it") as refused:
            run.locked().__enter__()
        assert refused.value.exit_code == 2
    finally:
        done.set()
        process.join(60)
    with run.locked():
        assert run.root.is_dir()


def test_lock_is_released_when_the_run_fails(run: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    with run.locked():
        assert run.root.is_dir()


def test_output_dir_that_is_a_file_is_refused(run: RunFolder) -> None:
    run.root.touch()
    with pytest.raises(StorageError, match="run: cannot be written"):
        run.locked().__enter__()


def test_output_dir_that_cannot_be_written_is_refused(run: RunFolder) -> None:
    (run.root / ".lock").mkdir(parents=True)
    with pytest.raises(StorageError, match="run: cannot be written"):
        run.locked().__enter__()


def test_what_a_killed_run_left_is_cleared_away_by_the_next(run: RunFolder) -> None:
    left = run.checkpoints_dir / ".step-000004.99999999.tmp"
    left.mkdir(parents=True)
    (run.root / ".config.yaml.99999999.tmp").touch()
    with run.locked():
        assert not left.exists()
        assert not (run.root / ".config.yaml.99999999.tmp").exists()


def test_disk_without_locks_is_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(StorageError, match=r"a disk that does not support locks.*choose an output_dir on another disk"):
        run.locked().__enter__()


def test_name_that_windows_reserves_is_refused_there(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "check_path", partial(check_path, system="nt"))
    with (
        pytest.raises(StorageError, match=r"output_dir: .*aux.* Windows reserves for a device"),
        RunFolder(run.root / "aux").locked(),
    ):
        pass
    assert not run.root.exists()


@pytest.mark.parametrize("content", ["", "{", "\xff"])
def test_damaged_json_is_as_good_as_missing(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_bytes(content.encode("latin-1"))
    assert read_json(tmp_path / "x.json") is None
    assert read_json(tmp_path / "nothing.json") is None


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, None, "süß"]})
    assert read_json(tmp_path / "x.json") == {"a": [1, None, "süß"]}
