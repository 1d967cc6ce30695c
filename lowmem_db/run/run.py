"""A run as a function, from the first check to ``final/``: what ``lowmem_db.train`` and ``lowmem-db train`` call."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from lowmem_db import environment
from lowmem_db.adaptation.finding import find_adaptation
from lowmem_db.adaptation.layers import count_trained
from lowmem_db.config.loading import to_yaml
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.data.batches import BatchSource
from lowmem_db.engine.build import build_ema, build_step, set_arithmetic
from lowmem_db.engine.samples import draw_images, draw_samples
from lowmem_db.evaluation.during_training import Scorer
from lowmem_db.models.finding import model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.measured import write_measured, write_plan, write_trained
from lowmem_db.planning.output import disk_in_words, summary, time_in_words
from lowmem_db.planning.plan import plan as plan_run
from lowmem_db.planning.target import target_of_device
from lowmem_db.preparation.prepare import check_photos, check_prompts, prepare
from lowmem_db.records import ImageRecord
from lowmem_db.run.checks import check_disk, check_folders, check_machine, uses_wandb
from lowmem_db.run.final import write_final
from lowmem_db.run.page import ReportPage, write_page
from lowmem_db.run.resuming import check_run_folder, with_choices_of_run
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.leftovers import sweep
from lowmem_db.storage.run_copy import restore_run
from lowmem_db.storage.run_folder import RunFolder, write_json
from lowmem_db.training.observers import ConsoleBar, MetricsFiles, Observer, RunCopy, Samples, ScoreKeeper
from lowmem_db.training.trainer import Trainer
from lowmem_db.training.weights_and_biases import WeightsAndBiases


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
    with run.locked():
        config, model, device, photos = _check_and_plan(run, config, resume=resume)
        if step is not None:
            run.forget_after(step)
        _train(run, config, model, device, photos, resume=resume, observers=observers)
    return run


def prepare_data(config: Config) -> BatchSource:
    """Fill the caches of a run (class images, latents, text embeddings) and return its batches.

    Args:
        config: The configuration.

    Raises:
        LowmemDbError: An error that the user can fix; each subclass says which.
    """
    sweep(config.cache_dir)
    device = environment.resolve_device(config.device)
    photos = check_photos(config)
    model = model_of(config)
    check_prompts(config, model, photos)
    set_arithmetic(config, device)
    return prepare(config, model, device, photos)


def _check_and_plan(
    run: RunFolder, config: Config, *, resume: bool
) -> tuple[Config, ModelFolder, torch.device, list[ImageRecord]]:
    """Check that the run is possible and choose its strategy, before anything expensive happens."""
    check_folders(config)
    sweep(config.cache_dir)
    if resume:
        _restore(run, config)
    config = with_choices_of_run(run, config)
    check_run_folder(run, config, resume=resume)
    device = environment.resolve_device(config.device)
    check_machine(config, device)
    photos = check_photos(config)
    model = model_of(config)
    plan = plan_run(config, target_of_device(config, device), model=model)
    config = plan.config
    for line in (summary(plan), time_in_words(plan), disk_in_words(plan)):
        say(line)
    check_disk(config, model)
    check_prompts(config, model, photos)
    write_text(run.config_file, to_yaml(config))
    write_json(run.environment_file, environment.describe())
    write_plan(run, plan)
    return config, model, device, photos


def _restore(run: RunFolder, config: Config) -> None:
    """Copy a run back that is gone from ``output_dir``."""
    copy = config.checkpointing.copy_to
    if copy is not None and (step := restore_run(run, RunFolder(copy))) is not None:
        say(f"{run.root}: restored step {step} from {copy}")


def _train(
    run: RunFolder,
    config: Config,
    model: ModelFolder,
    device: torch.device,
    photos: list[ImageRecord],
    *,
    resume: bool,
    observers: Sequence[Observer],
) -> None:
    """Prepare the data, train, and write the final model."""
    set_arithmetic(config, device)
    scorer = Scorer(config, [photo.path for photo in photos]) if config.evaluation.every else None
    batches = prepare(config, model, device, photos)
    trainer = build_trainer(config, model, device, batches, run)
    trainer.observers = [*_own_observers(trainer, model, scorer), *observers]
    write_trained(run, count_trained(trainer.denoiser.modules()))
    _say_what_trains(model, trainer, device)
    if resume:
        trainer.resume()
    trainer.train()
    if device.type == "cuda":
        write_measured(run, trainer.peak_step_bytes)
    best = trainer.step_to_keep()
    if best is not None and best != trainer.step:
        say(f"the final model is taken from step {best}, which scored best")
        trainer.observers = ()  # which refer to it, so that the model would stay in memory
        del trainer
        environment.release_memory(device)
        trainer = build_trainer(config, model, device, batches, run)
        trainer.resume(best)
    write_final(trainer, model)
    write_page(run)
    say(f"done: {run.final_dir} holds the {trainer.adaptation.noun}; draw with it: lowmem-db generate {run.root}")


def build_trainer(
    config: Config, model: ModelFolder, device: torch.device, batches: BatchSource, run: RunFolder
) -> Trainer:
    """Load the model onto the device and build the trainer, without observers.

    Args:
        config: The resolved configuration.
        model: The model.
        device: The device to train on.
        batches: All batches of the run.
        run: The run folder.
    """
    denoiser, objective, optimizer = build_step(config, model, device)
    ema = build_ema(config, denoiser, optimizer)
    return Trainer(config, run, denoiser, find_adaptation(config), objective, optimizer, batches, ema)


def _own_observers(trainer: Trainer, model: ModelFolder, scorer: Scorer | None) -> Iterator[Observer]:
    config, run, prompts = trainer.config, trainer.run, trainer.batches.prompts
    yield ConsoleBar()
    yield MetricsFiles()
    if uses_wandb(config):
        yield WeightsAndBiases()
    yield Samples(config, run, partial(draw_samples, config, model, trainer.denoiser, prompts, run))
    if config.checkpointing.copy_to is not None:
        yield RunCopy(run, RunFolder(config.checkpointing.copy_to))
    yield ReportPage(run)
    if scorer is not None:
        scored = sorted(config.prompts_scored)
        yield ScoreKeeper(
            config, run, lambda: dict(draw_images(config, model, trainer.denoiser, prompts, scored)), scorer
        )


def _say_what_trains(model: ModelFolder, trainer: Trainer, device: torch.device) -> None:
    trained = ", ".join(f"{name} {count:,}" for name, count in count_trained(trainer.denoiser.modules()).items())
    if (note := environment.slow_kernels(device)) is not None:
        say(note)
    say(f"training {model.name} ({model.family.name}) on {device}: {trained} parameters train")
