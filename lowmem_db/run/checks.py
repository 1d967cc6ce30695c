"""Checks before anything expensive happens: what this machine can do, and what its disk can hold."""

from pathlib import Path

import torch

from lowmem_db import environment
from lowmem_db.adaptation.finding import find_adaptation
from lowmem_db.config.schema import Config, Weights
from lowmem_db.engine.build import count_on_meta
from lowmem_db.errors import StorageError
from lowmem_db.memory import techniques
from lowmem_db.models.folder import ModelFolder
from lowmem_db.storage import hub
from lowmem_db.storage.run_folder import RunFolder

_WEIGHT_BYTES: dict[Weights, int] = {"fp32": 4, "bf16_extra_bits": 3, "bf16_stochastic": 2}  # per parameter
_STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1}


def check_machine(config: Config, device: torch.device) -> None:
    """Refuse what this machine cannot do, before a model is searched.

    Raises:
        ConfigError: The device does not support ``training.mixed_precision``.
        DependencyError: A library or login that was asked for is missing, or ``LOWMEM_DB_KERNELS`` asks for kernels
            that cannot run here.
        StorageError: The final model is to be uploaded, but nobody is logged in.
    """
    if device.index is not None:
        torch.cuda.set_device(device)  # for what asks for the current device, such as the planner
    environment.check_precision(config.training.mixed_precision or "no", device)
    techniques.check(config, device)
    environment.check_kernels(device)
    find_adaptation(config).check_machine(device)
    if config.logging.tensorboard:
        environment.require("tensorboard")
    if uses_wandb(config):
        environment.check_wandb()
    if config.final.push_to_hub:
        hub.check_login()


def uses_wandb(config: Config) -> bool:
    """Return whether the run is sent to Weights & Biases."""
    wanted = config.logging.wandb
    return environment.is_installed("wandb") if wanted is None else wanted


def check_disk(config: Config, model: ModelFolder) -> None:
    """Refuse a run whose checkpoints and final model do not fit on the disk.

    Raises:
        StorageError: The disk is too small.
    """
    needed = disk_bytes(config, model)
    free = environment.free_disk_bytes(config.output_dir) + _bytes_to_be_replaced(config.output_dir)
    if needed > free:
        raise StorageError(
            f"output_dir: {config.output_dir} needs {needed / environment.GIB:.1f} GiB for checkpoints and the final "
            f"model, but only {free / environment.GIB:.1f} GiB are free; lower checkpointing.keep, or use another disk"
        )


def _bytes_to_be_replaced(output_dir: Path) -> int:
    """Return the bytes of the checkpoints and the final model that already exist, as when a run is resumed."""
    run = RunFolder(output_dir)
    files = [file for folder in (run.checkpoints_dir, run.final_dir) for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def disk_bytes(config: Config, model: ModelFolder) -> int:
    """Return the most bytes that the checkpoints and the final model of a run occupy on the disk at once."""
    adaptation, trained = find_adaptation(config), count_on_meta(config, model)
    of_checkpoint = adaptation.values_in_checkpoint(model, trained) * _WEIGHT_BYTES[config.memory.weights or "fp32"]
    of_checkpoint += sum(trained.values()) * (_STATE_BYTES[config.optimizer.name] + 4 * config.ema.enabled)
    at_once = min(config.checkpointing.keep or config.training.max_train_steps, _num_checkpoints(config)) + 1
    at_once += config.evaluation.every is not None and config.evaluation.keep_best
    return int(of_checkpoint * at_once + 4 * adaptation.values_in_final(model, trained))


def _num_checkpoints(config: Config) -> int:
    last = config.training.max_train_steps
    intervals = [config.checkpointing.every, config.evaluation.every]
    if config.sampling.prompts and config.checkpointing.keep is not None:  # else those for samples are dropped
        intervals.append(config.sampling.every)
    return len({last} | {step for every in intervals if every for step in range(every, last + 1, every)})
