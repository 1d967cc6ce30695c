"""Save the model in memory before a full or missing disk ends the run; keep what a full card held."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from lowmem_db import environment
from lowmem_db.config.loading import to_yaml
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.errors import DiskFullError, StorageError
from lowmem_db.out_of_memory import Place
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.run_folder import RunFolder


def save_with_room(run: RunFolder, save: Callable[[], object], *, keep: int | None, also: int | None) -> None:
    """Save a checkpoint; if the disk is full, first delete the checkpoints that it supersedes.

    Args:
        run: The run folder.
        save: Writes the checkpoint.
        keep: The field ``checkpointing.keep``.
        also: A step whose checkpoint is always kept.

    Raises:
        StorageError: There is still no room; the newest checkpoint is untouched.
    """
    try:
        save()
    except DiskFullError:
        deleted = run.make_room(keep, also)
        if not deleted:
            raise
        say(f"the disk is full: deleted the checkpoints of steps {', '.join(map(str, deleted))} to make room")
        save()


@contextmanager
def saving_first(run: RunFolder, config: Config, step: int, save: Callable[[], object]) -> Iterator[None]:
    """Save the model in memory before a disk error in the block ends the run.

    Args:
        run: The run folder; its configuration is written again if the folder has vanished.
        config: The configuration.
        step: Optimizer steps done.
        save: Writes the checkpoint.

    Raises:
        StorageError: The error, and whether the model was saved.
    """
    try:
        yield
    except StorageError as error:
        try:
            save()
            if not run.config_file.is_file():
                write_text(run.config_file, to_yaml(config))
        except StorageError as second:
            raise StorageError(f"{error}; the model in memory could not be saved either: {second}") from error
        raise StorageError(f"{error}; the checkpoint of step {step} is saved: continue with --resume") from error


def write_row_or_save(
    run: RunFolder, config: Config, step: int, *, write: Callable[[], object], save: Callable[[], object]
) -> None:
    """Write the row of a step; if that fails, save a checkpoint, try once more, and end the run.

    Raises:
        StorageError: The row could not be written at first.
    """

    def save_and_write() -> None:
        save()
        with suppress(StorageError):  # a resume does not need the row of a step that has a checkpoint
            write()

    with saving_first(run, config, step, save_and_write):
        write()


def write_memory_summary(run: RunFolder, device: torch.device, place: Place) -> bool:
    """Write what the allocator of a full card holds into the run folder, before anything is freed.

    Args:
        run: The run folder.
        device: The device of the run.
        place: Whose memory was too small.

    Returns:
        Whether there is such a card; nothing is written otherwise.

    Raises:
        StorageError: The disk is full.
    """
    if place != "device" or device.type != "cuda":
        return False
    write_text(run.memory_summary_file, environment.memory_summary(device))
    return True
