"""A full or vanished disk costs no model that is in memory."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.errors import DiskFullError, StorageError
from lowmem_db.storage.run_folder import RunFolder, append_row, read_rows
from lowmem_db.training.rescue import save_with_room, write_row_or_save

FULL = DiskFullError("metrics.jsonl: the disk is full")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    for step in (1, 2, 3):
        write(run, step)
    return run


def write(run: RunFolder, step: int) -> Path:
    return run.write_checkpoint(step, lambda folder: (folder / "state").write_text("state") and None)


def full_while(condition: Callable[[], bool], save: Callable[[], object]) -> Callable[[], object]:
    def saving() -> object:
        if condition():
            raise DiskFullError("step-000004: the disk is full")
        return save()

    return saving


@pytest.mark.parametrize(("keep", "also", "left"), [(3, None, [2, 3, 4]), (1, None, [3, 4]), (2, 1, [1, 3, 4])])
def test_superfluous_checkpoints_make_room(
    run: RunFolder, keep: int, also: int | None, left: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    save = full_while(lambda: len(run.complete_steps()) == 3, lambda: write(run, 4))
    save_with_room(run, save, keep=keep, also=also)
    assert run.complete_steps() == left
    assert "the disk is full: deleted the checkpoints of steps" in capfd.readouterr().err


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_the_newest_checkpoint_stays_where_no_room_can_be_made(run: RunFolder, keep: int | None) -> None:
    with pytest.raises(DiskFullError):
        save_with_room(run, full_while(lambda: True, lambda: None), keep=keep, also=None)
    assert 3 in run.complete_steps()


def test_other_errors_delete_nothing(run: RunFolder) -> None:
    def fail() -> None:
        raise StorageError("step-000004: cannot be written (Read-only file system)")

    with pytest.raises(StorageError, match="Read-only"):
        save_with_room(run, fail, keep=1, also=None)
    assert run.complete_steps() == [1, 2, 3]


def test_the_model_is_saved_before_a_row_that_cannot_be_written_ends_the_run(
    run: RunFolder, tiny_config: Config
) -> None:
    rows = []

    def write_row() -> None:
        if not rows:
            rows.append("failed")
            raise FULL
        rows.append("written")

    with pytest.raises(
        StorageError, match=r"the disk is full; the checkpoint of step 4 is saved: continue with --resum"
    ):
        write_row_or_save(run, tiny_config, 4, write=write_row, save=lambda: write(run, 4))
    assert run.complete_steps()[-1] == 4
    assert rows == ["failed", "written"]


def test_a_vanished_folder_holds_a_run_that_can_go_on(run: RunFolder, tiny_config: Config) -> None:
    shutil.rmtree(run.root)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: .*No such file.*the checkpoint of step 4 is saved"):
        write_row_or_save(
            run, tiny_config, 4, write=lambda: append_row(run.metrics_file, {"step": 4}), save=lambda: write(run, 4)
        )
    assert run.complete_steps() == [4]
    assert load_config(run.config_file) == tiny_config
    assert [row["step"] for row in read_rows(run.metrics_file)] == [4]


def test_that_nothing_can_be_saved_is_said_too(run: RunFolder, tiny_config: Config) -> None:
    def fail() -> None:
        raise FULL

    with pytest.raises(StorageError, match=r"the model in memory could not be saved either: metrics\.jsonl: the disk"):
        write_row_or_save(run, tiny_config, 4, write=fail, save=fail)


def test_a_row_is_written_whole_or_not_at_all(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    append_row(run.metrics_file, {"step": 1})
    open_ = Path.open

    class HalfFull:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, line: bytes) -> int:
            self.file.write(line[:4])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda *arguments, **options: HalfFull(open_(*arguments, **options)))
    with pytest.raises(DiskFullError):
        append_row(run.metrics_file, {"step": 2})
    monkeypatch.undo()
    assert run.metrics_file.read_text() == '{"step": 1}\n'
