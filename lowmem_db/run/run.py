"""A run as a function, from the first check to ``final/``: what ``lowmem_db.train`` and ``lowmem-db train`` call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from lowmem_db import environment
from lowmem_db.config.loading import to_yaml
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.data.batches import BatchSource
from lowmem_db.distributed.world import World, joined
from lowmem_db.engine.build import set_arithmetic
from lowmem_db.engine.fitting import check_fits
from lowmem_db.evaluation.during_training import Scorer
from lowmem_db.models.finding import model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.out_of_memory import first_that_fits
from lowmem_db.planning.allowance import allocator_bytes
from lowmem_db.planning.measured import write_plan
from lowmem_db.planning.output import disk_in_words, summary, time_in_words
from lowmem_db.planning.plan import plan as plan_run
from lowmem_db.planning.target import Target, smallest, target_of_device
from lowmem_db.preparation.prepare import check_photos, check_prompts, photos_of, prepare
from lowmem_db.records import ImageRecord
from lowmem_db.run.absolute import with_absolute_paths
from lowmem_db.run.attempts import Attempts, PreparedRun
from lowmem_db.run.base import find_base_of
from lowmem_db.run.checks import check_disk, check_folders, check_machine
from lowmem_db.run.processes import check_cards, with_processes
from lowmem_db.run.resuming import check_run_folder, chosen_paths, with_choices_of_run
from lowmem_db.storage.asking import progress_told, take
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.leftovers import sweep
from lowmem_db.storage.run_copy import restore_run
from lowmem_db.storage.run_folder import RunFolder, write_json
from lowmem_db.training.observers import Observer

_PREPARING_NEEDS_LESS = (
    "free memory, or lower data.resolution, and run the same command again: what is prepared so far is kept"
)


def train(
    config: Config, *, resume: bool = False, step: int | None = None, observers: Sequence[Observer] = ()
) -> RunFolder:
    """Check, plan, prepare and train a run; return its folder, with the final model in it.

    Args:
        config: The configuration.
        resume: Continue from the newest complete checkpoint in ``output_dir``; start from scratch if there is none.
        step: Continue from the checkpoint of this step instead, and drop what came after it.
        observers: Notified while the run trains, after the run's own observers.

    Raises:
        LowmemDbError: An error that the user can fix; each subclass says which.
        RunInterrupted: The run was asked to stop; a checkpoint was saved.
    """
    run, resume = RunFolder(config.output_dir), resume or step is not None
    with joined() as world, _owned(run) if world.is_first else nullcontext():
        planned = _check_and_plan(run, with_processes(config, world.size), resume=resume, step=step, world=world)
        if step is not None and world.is_first:
            run.forget_after(step)
        with environment.held_to(planned.device, allocator_bytes(planned.target.budget_bytes)):
            Attempts(_prepare(run, planned, observers)).train(resume=resume)
    return run


@contextmanager
def _owned(run: RunFolder) -> Iterator[None]:
    """Return a context in which this process alone writes a run folder."""
    with run.locked(), progress_told(run):
        take(run)  # what an earlier run was asked for
        yield


def prepare_data(config: Config) -> BatchSource:
    """Fill the caches of a run (class images, latents, text embeddings) and return its batches.

    Args:
        config: The configuration.

    Raises:
        LowmemDbError: An error that the user can fix; each subclass says which.
    """
    check_folders(config)
    sweep(config.cache_dir)
    device = environment.resolve_device(config.device)
    photos = check_photos(config)
    model = model_of(config)
    check_fits(config, model)
    check_prompts(config, model, photos)
    set_arithmetic(config, device)
    return prepare(config, model, device, photos)


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A run that was checked and planned: attributes as in :class:`PreparedRun`, and its photos."""

    config: Config
    chosen: frozenset[str]
    model: ModelFolder
    device: torch.device
    target: Target
    photos: list[ImageRecord]
    world: World


def _check_and_plan(run: RunFolder, config: Config, *, resume: bool, step: int | None, world: World) -> _Planned:
    """Check that the run is possible and choose its strategy, before anything expensive happens.

    The first of several processes chooses for all; each checks its own machine.
    """
    check_folders(config)
    config, chosen = world.from_first(lambda: _with_choices(run, config, resume=resume, step=step))
    device = environment.resolve_device(config.device)
    check_cards(world, device)
    check_machine(config, device)
    photos = check_photos(config)
    model, config = find_base_of(run, config)
    target = smallest(world.gathered(target_of_device(config, device)))
    config = world.from_first(lambda: _planned(run, config, target, model, photos, chosen))
    environment.check_precision(config.training.mixed_precision or "no", device)
    return _Planned(config=config, chosen=chosen, model=model, device=device, target=target, photos=photos, world=world)


def _with_choices(run: RunFolder, config: Config, *, resume: bool, step: int | None) -> tuple[Config, frozenset[str]]:
    """Return the configuration with absolute paths and the run's choices, and the paths of the planner's fields."""
    sweep(config.cache_dir)
    if resume:
        _restore(run, config)
    config = with_absolute_paths(config)
    chosen = chosen_paths(run, config)
    config = with_choices_of_run(run, config)
    check_run_folder(run, config, resume=resume, step=step)
    return config, chosen


def _planned(
    run: RunFolder,
    config: Config,
    target: Target,
    model: ModelFolder,
    photos: list[ImageRecord],
    chosen: frozenset[str],
) -> Config:
    """Choose the strategy and write it into the run folder; return the resolved configuration."""
    plan = plan_run(config, target, model=model)
    config = plan.config
    for line in (
        *(target.notes if target.card.capability is not None else ()),
        summary(plan),
        time_in_words(plan),
        disk_in_words(plan),
    ):
        say(line)
    check_disk(config, model)
    check_prompts(config, model, photos)
    write_text(run.config_file, to_yaml(config))
    write_json(run.environment_file, environment.describe())
    write_plan(run, plan, chosen)
    return config


def _prepare(run: RunFolder, planned: _Planned, observers: Sequence[Observer]) -> PreparedRun:
    """Make what is missing of the data.

    Raises:
        BudgetError: Memory ran out, and nothing needs less.
    """
    config, model, device, photos = planned.config, planned.model, planned.device, planned.photos
    set_arithmetic(config, device)
    scorer = None
    if config.evaluation.every and planned.world.is_first:
        scorer = Scorer(config, [photo.path for photo in photos_of(config, photos, 0)])
    prepared = partial(prepare, config, model, device, photos)
    attempts = [("as planned", prepared), ("with what is free now", prepared)]  # what was prepared so far is kept
    return PreparedRun(
        run=run,
        config=config,
        chosen=planned.chosen,
        model=model,
        device=device,
        target=planned.target,
        batches=first_that_fits("preparation", attempts, _PREPARING_NEEDS_LESS),
        scorer=scorer,
        observers=observers,
        world=planned.world,
    )


def _restore(run: RunFolder, config: Config) -> None:
    """Copy a run back that is gone from ``output_dir``."""
    copy = config.checkpointing.copy_to
    if copy is not None and (step := restore_run(run, RunFolder(copy))) is not None:
        say(f"{run.root}: restored step {step} from {copy}")
