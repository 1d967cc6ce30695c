"""A copy of a run on a second disk, such as Google Drive: its newest checkpoint, its samples and its small files.

The checkpoint that a copy replaces is emptied before it is deleted, because a trash bin counts what lies in it.
"""

import shutil
from pathlib import Path

from lowmem_db.storage.atomic import as_storage_error, write_folder
from lowmem_db.storage.run_folder import MARKER, RunFolder


def copy_run(run: RunFolder, copy: RunFolder, step: int) -> None:
    """Copy a checkpoint, which becomes the only one of the copy, and everything small beside it.

    Args:
        run: The run.
        copy: Its copy.
        step: The step of a complete checkpoint.

    Raises:
        StorageError: The copy cannot be written; the one before it can still be used.
    """
    if step not in copy.complete_steps():
        _copy_checkpoint(run, copy, step)
    try:
        for older in copy.complete_steps():
            if older != step:
                _delete(copy.checkpoint_dir(older))
        for file in run.root.iterdir():
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, copy.root / file.name)
        if (samples := run.samples_dir(step)).is_dir() and not copy.samples_dir(step).is_dir():
            shutil.copytree(samples, copy.samples_dir(step))
    except OSError as error:
        raise as_storage_error(error, copy.root) from error


def restore_run(run: RunFolder, copy: RunFolder) -> int | None:
    """Copy a run back if it has no checkpoint and its copy has one; return the step, or None.

    Raises:
        StorageError: The disk is full.
    """
    if run.complete_steps() or not (steps := copy.complete_steps()):
        return None
    copy_run(copy, run, steps[-1])
    return steps[-1]


def _copy_checkpoint(run: RunFolder, copy: RunFolder, step: int) -> None:
    """Copy a checkpoint, its marker last."""

    def write(folder: Path) -> None:
        for file in run.checkpoint_dir(step).iterdir():
            if file.name != MARKER:
                shutil.copyfile(file, folder / file.name)

    write_folder(copy.checkpoint_dir(step), write)
    try:
        shutil.copyfile(run.checkpoint_dir(step) / MARKER, copy.checkpoint_dir(step) / MARKER)
    except OSError as error:
        raise as_storage_error(error, copy.root) from error


def _delete(folder: Path) -> None:
    """Delete a checkpoint, its marker first."""
    (folder / MARKER).unlink()
    for file in folder.iterdir():
        file.write_bytes(b"")
    shutil.rmtree(folder)
