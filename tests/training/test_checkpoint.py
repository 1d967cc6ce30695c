"""Checkpoints that are damaged or odd: exit code 2, the file, and the command that goes on."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lowmem_db.errors import CheckpointError
from lowmem_db.storage.checksums import manifest_text, of_folder
from lowmem_db.storage.run_folder import MARKER, RunFolder
from lowmem_db.training.checkpoint import restore_checkpoint, save_checkpoint
from tests.storage.test_checksums import flip, some_bits


@pytest.fixture
def objects() -> dict[str, nn.Module]:
    return {"unet": nn.Linear(8, 8), "optimizer": nn.Linear(4, 4)}


@pytest.fixture
def run(tmp_path: Path, objects: dict[str, nn.Module]) -> RunFolder:
    run = RunFolder(tmp_path / "a run")
    for step in (1, 2, 3):
        save_checkpoint(run, step, objects, data_key="data")
    return run


def sign_again(folder: Path) -> None:
    """Make the checksums fit what a folder holds now."""
    (folder / MARKER).unlink()
    (folder / MARKER).write_text(manifest_text(of_folder(folder), step=3))


def test_checkpoint_comes_back(run: RunFolder, objects: dict[str, nn.Module]) -> None:
    wanted = objects["unet"].weight.clone()
    torch.nn.init.zeros_(objects["unet"].weight)
    assert restore_checkpoint(run, 3, objects) == "data"
    assert torch.equal(objects["unet"].weight, wanted)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "unet.safetensors", "state.json"])
def test_flipped_bit_names_the_file_and_the_command_that_goes_on(
    run: RunFolder, objects: dict[str, nn.Module], name: str
) -> None:
    file = run.checkpoint_dir(3) / name
    for bit in some_bits(file, 12):
        flip(file, bit)
        with pytest.raises(CheckpointError) as refused:
            restore_checkpoint(run, 3, objects)
        said = str(refused.value)
        assert said.startswith(f"{file}: is damaged: its checksum is crc32:")
        assert said.endswith(
            f"delete {run.checkpoint_dir(3)}, then continue after step 2, the last intact checkpoint, with: "
            f"lowmem-db train '{run.config_file}' --resume"
        )
        flip(file, bit)


def test_checkpoints_that_are_damaged_too_are_passed_over(run: RunFolder, objects: dict[str, nn.Module]) -> None:
    for step in (2, 3):
        flip(run.checkpoint_dir(step) / "unet.safetensors", 999)
    two = f"delete {run.checkpoint_dir(2)} and {run.checkpoint_dir(3)}, then continue after step 1"
    with pytest.raises(CheckpointError, match=two):
        restore_checkpoint(run, 3, objects)
    flip(run.checkpoint_dir(1) / "unet.safetensors", 999)
    with pytest.raises(CheckpointError, match=r"step-000003, then start from scratch with: lowmem-db train"):
        restore_checkpoint(run, 3, objects)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", MARKER])
def test_missing_file_is_said(run: RunFolder, objects: dict[str, nn.Module], name: str) -> None:
    file = run.checkpoint_dir(3) / name
    file.unlink()
    if name == MARKER:
        assert run.complete_steps() == [1, 2]
        return
    with pytest.raises(CheckpointError, match=f"{name}: does not exist; delete"):
        restore_checkpoint(run, 3, objects)


def test_checkpoint_of_an_older_version_is_restored_with_a_remark(
    run: RunFolder, objects: dict[str, nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    (run.checkpoint_dir(3) / MARKER).write_text("3\n")
    assert restore_checkpoint(run, 3, objects) == "data"
    assert "was written by an older version without checksums, so its files are not verified" in capfd.readouterr().err


ODD_LISTS = [
    "", "[]", "3", "null", "{}", '{"step": 3}', '{"step": 2, "objects": ["optimizer", "unet"], "data_key": "x"}',
    '{"step": 3, "objects": {"unet": 1}, "data_key": "x"}', '{"step": 3, "objects": [1], "data_key": "x"}',
    '{"step": 3, "objects": ["optimizer", "unet"], "data_key": 7}', "[" * 50_000, '{"step": 3, "objects": null}',
]  # fmt: skip


@pytest.mark.parametrize("content", ODD_LISTS)
@pytest.mark.parametrize("signed", [True, False])
def test_odd_list_is_refused(run: RunFolder, objects: dict[str, nn.Module], content: str, signed: bool) -> None:
    file = run.checkpoint_dir(3) / "state.json"
    file.write_text(content)
    if signed:
        sign_again(run.checkpoint_dir(3))
    else:
        (run.checkpoint_dir(3) / MARKER).write_text("3\n")
    with pytest.raises(CheckpointError, match=r"state\.json: is damaged; delete .* continue after step 2"):
        restore_checkpoint(run, 3, objects)


def test_other_objects_are_refused_with_the_way_out(run: RunFolder, objects: dict[str, nn.Module]) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer, unet, but this run has ema, optimizer, unet; resume with"):
        restore_checkpoint(run, 3, {**objects, "ema": nn.Linear(1, 1)})


def test_state_that_does_not_fit_is_refused(run: RunFolder) -> None:
    with pytest.raises(CheckpointError, match=r"step-000003: cannot be restored \(.*size mismatch"):
        restore_checkpoint(run, 3, {"unet": nn.Linear(9, 8), "optimizer": nn.Linear(4, 4)})


def test_list_is_json_with_the_names(run: RunFolder) -> None:
    found = json.loads((run.checkpoint_dir(3) / "state.json").read_text())
    assert found == {"step": 3, "objects": ["optimizer", "unet"], "data_key": "data"}
