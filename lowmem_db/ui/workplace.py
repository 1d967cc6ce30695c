"""The runs that the page shows, and what each of them does."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_db.config.yaml_text import YamlError, parse_yaml, read_text
from lowmem_db.errors import CheckpointError
from lowmem_db.reporting.view import duration
from lowmem_db.storage.asking import ask, progress_of
from lowmem_db.storage.run_folder import RunFolder, read_json, read_rows
from lowmem_db.ui import jobs

State = Literal["waiting", "preparing", "training", "finished", "stopped", "failed"]


class Workplace:
    """A folder of runs, and runs elsewhere that were opened.

    Args:
        runs: The folder; new runs are made there.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.own = runs / ".ui"
        """Drafts, and which runs were opened."""

    @property
    def home(self) -> Path:
        """The folder of configurations and photos, beside the runs."""
        return self.runs.absolute().parent

    def all(self) -> dict[str, RunFolder]:
        """Return all runs by the names that addresses use, the newest first."""
        found = [folder for folder in _folders(self.runs) if is_run(folder)]
        found.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        named = {folder.name: RunFolder(folder) for folder in found}
        for folder in self._opened():
            if is_run(folder) and folder.resolve() not in {run.root.resolve() for run in named.values()}:
                named[_free(folder.name, named)] = RunFolder(folder)
        return named

    def open(self, folder: Path) -> str:
        """Show a run that lies elsewhere; return its name.

        Raises:
            CheckpointError: It is not a run.
        """
        if not is_run(folder):
            raise CheckpointError(f"folder: {folder} is not a run; allowed: the output_dir of one, with a config.yaml")
        folder = folder.absolute()
        if folder.parent.resolve() != self.runs.resolve() and folder not in self._opened():
            self.own.mkdir(parents=True, exist_ok=True)
            file = self.own / "opened.json"
            file.write_text(json.dumps([*map(str, self._opened()), str(folder)]), encoding="utf-8")
        return next(name for name, run in self.all().items() if run.root.resolve() == folder.resolve())

    def _opened(self) -> list[Path]:
        listed = read_json(self.own / "opened.json")
        return [Path(path) for path in listed if isinstance(path, str)] if isinstance(listed, list) else []


@dataclass(frozen=True)
class Status:
    """What a run does.

    Attributes:
        state: In a word.
        step: Steps done.
        total: Steps in all, or None while that is not known.
        words: The same for people.
        message: Why it failed.
        log: The end of what it said, if the page started it.
        has_checkpoint: Whether there is a model to draw from.
        is_asked: What it is asked for and has not done yet.
    """

    state: State
    step: int
    total: int | None
    words: str
    message: str = ""
    log: str = ""
    has_checkpoint: bool = False
    is_asked: tuple[str, ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether a process works on it."""
        return self.state in {"waiting", "preparing", "training"}


def status_of(run: RunFolder) -> Status:
    """Return what a run does, whoever started it."""
    job, is_running = jobs.job_in(train_folder(run)), run.is_in_use()  # before the files that a run ends with
    rows = read_rows(run.metrics_file)
    step = max([0, *(row["step"] for row in rows[-1:]), *run.complete_steps()[-1:]])
    total = _total(run)
    asked = tuple(sorted(path.name for path in (run.root / "requests").glob("*"))) if is_running else ()
    state: State
    if is_running or job.is_running:
        state, words = _doing(run, rows, step, total)
    elif run.final_dir.is_dir():
        state, words = "finished", f"finished after {step:,} steps"
    elif job.state == "failed":
        state, words = "failed", "ended with an error"
    else:
        state, words = "stopped", f"stopped after step {step:,}" if step else "not started"
    return Status(
        state=state,
        step=step,
        total=total,
        words=words,
        message=job.message if state == "failed" else "",
        log=job.log,
        has_checkpoint=bool(run.complete_steps()) or run.final_dir.is_dir(),
        is_asked=asked,
    )


def train(run: RunFolder, config_file: Path) -> None:
    """Start or continue a run in a process of its own.

    Raises:
        LowmemDbError: It runs already.
    """
    if run.is_in_use():
        raise CheckpointError(f"RUN: {run.root} is trained already, by another process")
    jobs.start(train_folder(run), [["train", str(config_file), "--resume"]])


def stop(run: RunFolder) -> None:
    """Let a run save and stop; one that is only prepared stops at once, and keeps what is prepared."""
    if status_of(run).state == "training":
        ask(run, "stop")
    elif jobs.job_in(train_folder(run)).is_running:
        jobs.stop(train_folder(run))
    elif run.is_in_use():
        ask(run, "stop")


def train_folder(run: RunFolder) -> Path:
    """Return the folder of the job that trains a run."""
    return run.root / "jobs" / "train"


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run, or is going to be one."""
    return (folder / "config.yaml").is_file() or (folder / "jobs" / "train").is_dir()


def config_of(run: RunFolder) -> dict[str, Any]:
    """Return the configuration of a run as nested mappings; empty if it cannot be read."""
    try:
        tree = parse_yaml(read_text(run.config_file))
    except (OSError, YamlError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _doing(run: RunFolder, rows: list[dict[str, Any]], step: int, total: int | None) -> tuple[State, str]:
    progress = progress_of(run)
    if progress is not None and not rows:
        return "preparing", f"preparing: {progress['doing']}, {progress['done']} of {progress['total']}"
    if not rows or total is None:
        return ("preparing", "preparing") if run.config_file.is_file() else ("waiting", "reading photos, planning")
    pace = sorted(row["seconds"] for row in rows[-20:] if isinstance(row.get("seconds"), int | float))
    left = f", {duration((total - step) * pace[len(pace) // 2])} left" if pace else ""
    return "training", f"step {step:,} of {total:,}{left}"


def _total(run: RunFolder) -> int | None:
    training = config_of(run).get("training")
    total = training.get("max_train_steps") if isinstance(training, dict) else None
    return total if isinstance(total, int) else None


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []


def _free(name: str, taken: dict[str, Any]) -> str:
    number = 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    return candidate
