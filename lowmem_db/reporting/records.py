"""What a run folder says about its run, read without trusting it: whatever is missing or damaged is left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowmem_db.config.yaml_text import YamlError, parse_yaml, read_text
from lowmem_db.errors import CheckpointError
from lowmem_db.storage.run_folder import RunFolder, read_json, read_rows

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")


@dataclass(frozen=True)
class RunRecord:
    """The files of a run, read.

    Attributes:
        run: The run folder.
        config: ``config.yaml``, as nested mappings.
        rows: The rows of ``metrics.jsonl``.
        scores: The rows of ``scores.jsonl``.
        plan: ``plan.json``.
        environment: ``environment.json``.
        samples: The pictures of each step that has samples, in the order of the prompts, by step.
        checkpoints: The steps that have a complete checkpoint.
        is_finished: Whether there is a final model.
    """

    run: RunFolder
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    samples: dict[int, list[Path]] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    is_finished: bool = False

    def field(self, path: str, default: Any = None) -> Any:
        """Return the value of a field of the configuration, given by its dotted path."""
        return look_up(self.config, path, default)

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.run.root.absolute().name

    @property
    def last_step(self) -> int:
        """Steps done so far."""
        return max([0, *(row["step"] for row in self.rows), *self.checkpoints])


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        CheckpointError: It does not exist, or was never trained in.
    """
    run = RunFolder(folder)
    if not folder.is_dir():
        raise CheckpointError(f"RUN: {folder} is not a folder; give the output_dir of a run")
    try:
        config = _parsed(read_text(run.config_file))
    except (OSError, ValueError, YamlError) as error:
        raise CheckpointError(
            f"RUN: {folder} has no readable config.yaml ({error}); give the output_dir of a run, which holds one"
        ) from error
    return RunRecord(
        run=run,
        config=config,
        rows=read_rows(run.metrics_file),
        scores=read_rows(run.scores_file),
        plan=_mapping(read_json(folder / "plan.json")),
        environment=_mapping(read_json(run.environment_file)),
        samples=_samples(folder / "samples"),
        checkpoints=run.complete_steps(),
        is_finished=run.final_dir.is_dir(),
    )


def look_up(values: Any, path: str, default: Any = None) -> Any:
    """Return the value at a dotted path of nested mappings, or the default."""
    for key in path.split("."):
        if not isinstance(values, Mapping) or key not in values:
            return default
        values = values[key]
    return default if values is None else values


def mappings(values: Any) -> list[Mapping[str, Any]]:
    """Return the mappings in a list; none if it is not a list."""
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder, sorted by name; none if it cannot be read."""
    try:
        return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file())
    except OSError:
        return []


@lru_cache(maxsize=64)
def _parsed(text: str) -> Mapping[str, Any]:
    """Return the fields of a YAML text: kept, because the page of a run that goes on is written often.

    Raises:
        ValueError: It has none.
    """
    fields = parse_yaml(text)
    if not isinstance(fields, Mapping):
        raise ValueError("it holds no fields")
    return fields


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _samples(folder: Path) -> dict[int, list[Path]]:
    found = {}
    for step_folder in sorted(folder.glob("step-*")) if folder.is_dir() else []:
        digits = step_folder.name.removeprefix("step-")
        pictures = [picture for picture in pictures_in(step_folder) if picture.stem != "grid"]
        if digits.isdecimal() and pictures:
            found[int(digits)] = pictures
    return dict(sorted(found.items()))
