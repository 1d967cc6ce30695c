"""The run folder: the place of each file of a run, and which checkpoints are complete.

A checkpoint counts only if its marker ``COMPLETE`` exists, which is written last.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowmem_db.errors import CheckpointError, StorageError
from lowmem_db.storage.atomic import as_storage_error, write_folder, write_text
from lowmem_db.storage.checksums import manifest_text, of_folder
from lowmem_db.storage.disk import check_path, flush_file
from lowmem_db.storage.leftovers import sweep

MARKER = "COMPLETE"
_LOOKING_SECONDS = 0.3  # longer than somebody holds the lock who only looks whether it is free
_STEP_FOLDER = re.compile(r"step-(\d+)")


class RunFolder:
    """The files of one run.

    Args:
        root: The field ``output_dir``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_file = root / "config.yaml"
        self.environment_file = root / "environment.json"
        self.memory_summary_file = root / "memory_summary.txt"
        self.metrics_file = root / "metrics.jsonl"
        self.scores_file = root / "scores.jsonl"
        self.ranks_file = root / "ranks.jsonl"
        self.checkpoints_dir = root / "checkpoints"
        self.tensorboard_dir = root / "tensorboard"
        self.final_dir = root / "final"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs, and delete what killed ones left behind.

        Raises:
            CheckpointError: Another run is writing to it.
            StorageError: The folder cannot be created, or its disk does not support locks.
        """
        check_path(self.root.absolute(), "output_dir")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise as_storage_error(error, self.root) from error
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=_LOOKING_SECONDS, poll_interval=0.05)
        except Timeout:
            raise CheckpointError(
                f"output_dir: {self.root} is in use by another run; wait for it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise as_storage_error(error, self.root) from error
        except NotImplementedError as error:
            raise StorageError(
                f"output_dir: {self.root} is on a disk that does not support locks, so two runs could write to it at "
                "once; choose an output_dir on another disk, and copy the run afterwards"
            ) from error
        sweep(self.root, idle_seconds=0.0)
        try:
            yield
        finally:
            lock.release()

    def is_in_use(self) -> bool:
        """Return whether a run is writing to the folder now."""
        if not (self.root / ".lock").exists():
            return False
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError, NotImplementedError):
            return True
        lock.release()
        return False

    def samples_dir(self, step: int) -> Path:
        """Return the folder of the samples of a step."""
        return self.root / "samples" / f"step-{step:06d}"

    def newest_sample(self, name: str = "00-00.png", step: int | None = None) -> Path | None:
        """Return an image of the newest samples, by default the first, or None if the run has drawn none.

        Args:
            name: The file.
            step: The step whose samples are preferred.
        """
        if step is not None and (own := self.samples_dir(step) / name).is_file():
            return own
        files = sorted((self.root / "samples").glob(f"step-*/{name}"))
        return files[-1] if files else None

    def checkpoint_dir(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.checkpoints_dir / f"step-{step:06d}"

    def complete_steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, in ascending order."""
        if not self.checkpoints_dir.is_dir():
            return []
        found = ((_STEP_FOLDER.fullmatch(folder.name), folder) for folder in self.checkpoints_dir.iterdir())
        return sorted(int(match[1]) for match, folder in found if match and (folder / MARKER).is_file())

    def write_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint: temporary folder, flush, rename, marker with the checksums of its files.

        The rows of the steps up to it are flushed to the disk before the marker is written.

        Args:
            step: Optimizer steps done.
            write: Fills the folder that it is given.

        Raises:
            StorageError: The disk is full; older checkpoints are untouched.
        """
        path = self.checkpoint_dir(step)
        if (path / MARKER).is_file():  # the same step of the same run: the same bytes
            return path
        checksums: dict[str, str] = {}

        def write_and_sum(folder: Path) -> None:
            write(folder)
            checksums.update(of_folder(folder))

        write_folder(path, write_and_sum)
        self.flush_rows()
        write_text(path / MARKER, manifest_text(checksums, step=step))
        return path

    def flush_rows(self) -> None:
        """Flush the rows of steps to the disk.

        Raises:
            StorageError: The disk is full or broken.
        """
        for file in self._files_of_rows():
            try:
                if file.is_file():
                    flush_file(file)
            except OSError as error:
                raise as_storage_error(error, file) from error

    def make_room(self, keep: int | None, also: int | None = None) -> list[int]:
        """Delete the checkpoints that the next one supersedes, but never the newest; return their steps."""
        complete = self.complete_steps()
        if keep is not None:
            self.prune_checkpoints(max(1, keep - 1), also)
        return sorted({*complete} - {*self.complete_steps()})

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints and samples after a step, because the run goes on from there.

        Raises:
            CheckpointError: The step has no complete checkpoint.
        """
        complete = self.complete_steps()
        if step not in complete:
            raise CheckpointError(f"{self.checkpoint_dir(step)}: is not a complete checkpoint; choose from {complete}")
        later = [self.checkpoint_dir(done) for done in complete if done > step]
        later += [folder for folder in self.root.glob("samples/step-*") if folder.name > self.samples_dir(step).name]
        for folder in later:
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def prune_checkpoints(
        self, keep: int | None, also: int | None = None, is_passing: Callable[[int], bool] = lambda step: False
    ) -> None:
        """Delete all but the newest ``keep`` complete checkpoints, and what killed runs left behind.

        The checkpoint of the step ``also`` is kept too, and so is everything that this program did not write, such as
        ``.DS_Store``, a renamed checkpoint, or a link.

        Args:
            keep: How many to keep. None for all.
            also: A step whose checkpoint is kept in addition.
            is_passing: Whether the checkpoint of a step is not worth keeping once there is a newer one.
        """
        complete = self.complete_steps()
        steps = {*complete[-1:], *(step for step in complete[-(keep or len(complete)) :] if not is_passing(step))}
        steps |= set() if also is None else {also}
        kept = {self.checkpoint_dir(step) for step in steps}
        for folder in list(self.checkpoints_dir.iterdir()):
            if folder not in kept and _STEP_FOLDER.fullmatch(folder.name) and not folder.is_symlink():
                (folder / MARKER).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
        sweep(self.checkpoints_dir, idle_seconds=0.0)

    def truncate_rows(self, step: int) -> None:
        """Drop the rows after a step, and incomplete last rows."""
        for file in self._files_of_rows():
            if file.is_file():
                write_text(file, "".join(json.dumps(row) + "\n" for row in read_rows(file) if row["step"] <= step))

    def _files_of_rows(self) -> tuple[Path, ...]:
        return self.metrics_file, self.scores_file, self.ranks_file


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append the row of a step, completely or not at all.

    Raises:
        StorageError: The disk is full, or the folder has vanished.
    """
    line = (json.dumps(row) + "\n").encode()
    try:
        with file.open("ab", buffering=0) as opened:
            start = opened.tell()
            try:
                if opened.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    opened.truncate(start)
                raise
    except OSError as error:
        raise as_storage_error(error, file) from error


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a file; none if it does not exist."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for line in lines if (row := _parse_row(line)) is not None]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any | None:
    """Return the value in a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
