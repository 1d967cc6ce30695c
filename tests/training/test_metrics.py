"""Rows of ``metrics.jsonl``."""

import json
from pathlib import Path

import pytest

from lowmem_db.errors import StorageError
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.metrics import MetricsWriter

ROW = {"step": 1, "loss": 0.5, "loss_prior": None}


@pytest.mark.parametrize("tensorboard", [False, True])
def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path, tensorboard: bool) -> None:
    run = RunFolder(tmp_path)
    writer = MetricsWriter(run, tensorboard=tensorboard, start_step=0)
    for step in (1, 2):
        writer.write(ROW | {"step": step})
        rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        assert rows == [ROW | {"step": done} for done in range(1, step + 1)]
    writer.close()
    assert run.tensorboard_dir.is_dir() == tensorboard


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_full_disk_is_said(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics_file.symlink_to("/dev/full")
    writer = MetricsWriter(run, tensorboard=False, start_step=0)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: the disk is full; free some space"):
        writer.write(ROW)
    writer.close()
