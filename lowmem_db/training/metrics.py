"""What a run records about its steps: a row in ``metrics.jsonl``, and TensorBoard curves if enabled."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem_db import environment
from lowmem_db.storage.atomic import as_storage_error
from lowmem_db.storage.run_folder import RunFolder, append_row


class MetricsWriter:
    """Appends a row per step.

    Args:
        run: The run folder; rows after ``start_step`` must be gone already.
        tensorboard: Whether to write event files. None means: if tensorboard is installed.
        start_step: Steps that are done.

    Raises:
        DependencyError: TensorBoard is asked for but missing.
    """

    def __init__(self, run: RunFolder, *, tensorboard: bool | None, start_step: int) -> None:
        self._file, self._folder = run.metrics_file, run.tensorboard_dir
        wanted = environment.is_installed("tensorboard") if tensorboard is None else tensorboard
        self._curves = _open_curves(run.tensorboard_dir, start_step) if wanted else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a None is null in the file and absent from the curves.

        Raises:
            StorageError: The disk is full.
        """
        append_row(self._file, row)
        self.write_curves(row)

    def write_curves(self, row: Mapping[str, Any]) -> None:
        """Add the values of a step to the curves.

        Raises:
            StorageError: The disk is full.
        """
        if self._curves is None:
            return
        try:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._curves.add_scalar(name, value, row["step"])
        except OSError as error:
            raise as_storage_error(error, self._folder) from error

    def close(self) -> None:
        """Flush and close the curves; a full disk was already reported by an earlier write."""
        if self._curves is not None:
            with suppress(OSError):
                self._curves.close()


def _open_curves(folder: Path, start_step: int) -> Any:
    environment.require("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step + 1)
