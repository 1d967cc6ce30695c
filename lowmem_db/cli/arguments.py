"""From the arguments of ``train``, ``plan`` and ``prepare`` to a configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_db.config.flags import Arguments, checkpoint_step, parse_arguments
from lowmem_db.config.loading import load_config, read_yaml
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.data.epochs import photos_per_epoch, steps_per_epoch
from lowmem_db.errors import CheckpointError, ConfigError, DataError
from lowmem_db.launch import launched

Overrides = list[tuple[str, Any]]


@dataclass(frozen=True)
class Request:
    """What the arguments ask for.

    Attributes:
        config: The configuration.
        resume: Continue from a checkpoint.
        step: The step of the checkpoint to continue from. None for the newest complete one.
    """

    config: Config
    resume: bool
    step: int | None


def read_arguments(arguments: Sequence[str], *, resume: bool = False, needs_photos: bool = True) -> Request:
    """Return the configuration, and what to resume from.

    Args:
        arguments: What was given.
        resume: Whether ``--resume`` was given apart from them.
        needs_photos: Whether the photo folder must exist; without it epochs are not counted.

    Raises:
        ConfigError: With every problem found, one per line.
        CheckpointError: The checkpoint to continue from is not one of the run.
        DataError: Epochs are to be counted, but the photo folder cannot be read.
    """
    parsed = parse_arguments(arguments)
    parsed.resume |= resume
    if len(parsed.positional) > 1:
        raise ConfigError(
            f"{' '.join(parsed.positional[1:])}: only one configuration file can be given; the rest "
            "must be section.key=value"
        )
    for note in parsed.notes:
        say(note)
    path = Path(parsed.positional[0]) if parsed.positional else None
    overrides = [*_defaults(parsed).items(), *parsed.overrides, *_processes()]
    config = load_config(path, overrides)
    try:
        counted = _count_epochs(config, parsed)
    except DataError as error:
        if needs_photos:
            raise
        say(f"epochs are not counted: {error}")
    else:
        config = load_config(path, [*overrides, *counted]) if counted else config
    return Request(config, parsed.resume, _step(config, parsed.checkpoint))


def _processes() -> Overrides:
    """Return the number of processes as a field, if a launcher has started more than one: steps per epoch need it."""
    size = launched().size
    return [("distributed.num_processes", size)] if size > 1 else []


def _defaults(parsed: Arguments) -> Mapping[str, Any]:
    """Return the defaults of the script; a run that is continued keeps its own values instead."""
    output_dir = dict(parsed.overrides).get("output_dir", parsed.defaults.get("output_dir"))
    if not parsed.resume or output_dir is None:
        return parsed.defaults

    from lowmem_db.storage.run_folder import RunFolder

    file = RunFolder(Path(str(output_dir)).expanduser()).config_file
    if not file.is_file():
        return parsed.defaults
    before = read_yaml(file)
    values = {path: _value(before, path) for path in parsed.defaults}
    return {path: value for path, (is_known, value) in values.items() if is_known}


def _value(tree: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Return whether a tree holds a field, and its value."""
    section, _, name = path.rpartition(".")
    fields = tree.get(section, {}) if section else tree
    return (True, fields[name]) if isinstance(fields, Mapping) and name in fields else (False, None)


def _count_epochs(config: Config, parsed: Arguments) -> Overrides:
    """Return the fields for which epochs were given."""
    counts = dict(parsed.counts)
    repeats = counts.pop("repeats", 1)
    if "num_train_epochs" in counts and "max_train_steps" in parsed.flags:
        del counts["num_train_epochs"]
        say("--num_train_epochs: no effect with --max_train_steps")
    if not counts:
        if "repeats" in parsed.counts:
            say("--repeats: no effect; photos are repeated until --max_train_steps are done")
        return []
    if config.textual_inversion.enabled:  # the script takes photos for steps
        epoch = photos_per_epoch(config, repeats=repeats)
    else:
        epoch = steps_per_epoch(config, repeats=repeats)
    fields = {"num_train_epochs": "training.max_train_steps", "validation_epochs": "sampling.every"}
    counted = [(fields[flag], epochs * epoch) for flag, epochs in counts.items()]
    for (field, steps), (flag, epochs) in zip(counted, counts.items(), strict=True):
        given = "" if flag in parsed.flags else "default of "
        say(f"{given}--{flag}={epochs}: {field}={steps} ({epoch} optimizer steps per epoch)")
    return counted


def _step(config: Config, checkpoint: Path | None) -> int | None:
    """Return the step of a checkpoint of the run.

    Raises:
        CheckpointError: It belongs to another run, or does not exist.
    """
    step = None if checkpoint is None else checkpoint_step(checkpoint)
    if checkpoint is None or step is None:
        return None

    from lowmem_db.storage.run_folder import RunFolder

    run = RunFolder(config.output_dir)
    if checkpoint.parent != Path() and checkpoint.parent.resolve() not in {
        run.root.resolve(),
        run.checkpoints_dir.resolve(),
    }:
        raise CheckpointError(
            f"--resume_from_checkpoint: {checkpoint} is not in {run.root}; set --output_dir to the run it belongs to"
        )
    if step not in (steps := run.complete_steps()):
        there = ", ".join(["latest", *(f"checkpoint-{found}" for found in steps)])
        raise CheckpointError(
            f"--resume_from_checkpoint: {run.root} has no complete checkpoint of step {step}; allowed: {there}"
        )
    return step
