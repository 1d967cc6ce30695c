"""Whether a run may start or continue in a folder, and which fields differ from when it started."""

from collections.abc import Iterator
from typing import Any

from lowmem_db.config.loading import read_yaml
from lowmem_db.config.rules import refusals
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import fields, open_paths, resolve
from lowmem_db.console import quoted, say
from lowmem_db.errors import CheckpointError, ConfigError
from lowmem_db.planning.measured import read_chosen
from lowmem_db.run.absolute import absolute_tree
from lowmem_db.run.base import FIELDS, recorded_model
from lowmem_db.run.processes import say_photos_per_step
from lowmem_db.storage.run_folder import RunFolder

FIXED_FIELDS = (
    "model.base",
    "model.revision",
    "model.vae",
    "model.clip_skip",
    "model.prompt_chunks",
    "training.train_text_encoder",
    "training.stop_text_encoder_training",
    "training.layers",
    "lora.enabled",
    "lora.rank",
    "lora.alpha",
    "lora.rank_stabilized",
    "lora.dora",
    "lora.targets",
    "lora.base_weights",
    "model.embeddings",
    "super_resolution.noise_augmentation",
    "super_resolution.low_resolution",
    "textual_inversion.enabled",
    "textual_inversion.token",
    "textual_inversion.num_vectors",
    "textual_inversion.initializer",
    "optimizer.name",
    "memory.weights",
    "memory.channels_last",
    "memory.tiled_preparation",
    "ema.enabled",
    "data.resolution",
    "data.aspect_ratio_buckets",
    "evaluation.encoder",
    "evaluation.prompts",
    "evaluation.keep_best",
)
"""Fields that cannot change during a run."""
_BEFORE_IT_EXISTED = {"memory.channels_last": False, "memory.tiled_preparation": False}
"""What runs did that older versions started, where it is a fixed field that they do not know."""


def chosen_paths(run: RunFolder, config: Config) -> frozenset[str]:
    """Return the paths of the fields that are the planner's choice: those left open, and those it chose for the run.

    The configuration in a run folder holds both what the user gave and what the planner chose.
    """
    before = read_yaml(run.config_file) if run.complete_steps() else {}
    by_path = {field.path: field for field in fields()}
    of_run = {path for path in read_chosen(run) & by_path.keys() if before}
    return open_paths(config) | {path for path in of_run if by_path[path].of(config) == by_path[path].of(before)}


def with_choices_of_run(run: RunFolder, config: Config) -> Config:
    """Fill in what the configuration leaves open with the choices of the run, if it has a checkpoint.

    A field that is unknown to the version that started the run gets its value without a plan.

    Raises:
        ConfigError: A choice of the run cannot be combined with the configuration.
    """
    if not run.complete_steps():
        return config
    before = read_yaml(run.config_file)
    filled = resolve(config, {field.path: field.of(before) for field in fields()})
    if problems := refusals(filled):
        raise ConfigError("\n".join(f"{problem} (fields left open are taken from {run.root})" for problem in problems))
    return filled


def check_run_folder(run: RunFolder, config: Config, *, resume: bool, step: int | None = None) -> None:
    """Refuse to overwrite a run, or to continue it with a changed fixed field; say which other fields differ.

    Args:
        run: Its folder.
        config: The configuration.
        resume: Whether it is to be continued.
        step: The checkpoint to continue from. Default: the newest.

    Raises:
        CheckpointError: The folder holds checkpoints and ``--resume`` was not given, or a fixed field differs.
        ConfigError: The run has more steps behind it than it is to have.
    """
    if not run.complete_steps():
        _refuse_finished_model(run)
        return
    if not resume:
        raise CheckpointError(
            f"output_dir: {run.root} holds a run with checkpoints; continue it with --resume, choose another "
            "output_dir, or delete the folder"
        )
    trees = read_yaml(run.config_file), config.model_dump(mode="json")
    before, now = (dict(_flat(absolute_tree(tree))) for tree in trees)
    for field, value in _BEFORE_IT_EXISTED.items():
        if before.get(field) is None:
            before[field] = value
    if recorded_model(run):  # bytes are compared, not names
        before = {field: value for field, value in before.items() if field not in FIELDS}
    changed = {  # a field that is unknown to the run's version has not changed
        field: (before[field], value) for field, value in now.items() if field in before and before[field] != value
    }
    fixed = [
        f"{field} from {changed[field][0]!r} to {changed[field][1]!r}" for field in FIXED_FIELDS if field in changed
    ]
    if fixed:
        raise CheckpointError(
            f"--resume: {run.root} cannot change {'; '.join(fixed)}; resume with {run.config_file}, or choose another "
            "output_dir"
        )
    _refuse_fewer_steps(run, config.training.max_train_steps, step)
    for field, (old, new) in changed.items():
        say(f"resume: {field} was {old!r}, is now {new!r}")
    say_photos_per_step(before, now)


def _refuse_fewer_steps(run: RunFolder, wanted: int, step: int | None) -> None:
    done = run.complete_steps()
    start = done[-1] if step is None else step
    if start > wanted:
        earlier = [each for each in done if each <= wanted]
        back = f"; or go back with --resume_from_checkpoint checkpoint-{earlier[-1]}" if earlier else ""
        raise ConfigError(
            f"training.max_train_steps: {wanted}, but {run.root} continues from its checkpoint of step {start}; "
            f"allowed: {start} or more. An earlier model: lowmem-db export {quoted(run.root)} --step N{back}"
        )


def _refuse_finished_model(run: RunFolder) -> None:
    if run.final_dir.exists():
        raise CheckpointError(
            f"output_dir: {run.final_dir} holds a finished model, and its run has no checkpoints; choose another "
            "output_dir, or delete the folder"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
