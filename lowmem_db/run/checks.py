"""Checks before anything expensive happens: what this machine can do, and what its disk can hold."""

from pathlib import Path

import torch

from lowmem_db import environment
from lowmem_db.adaptation.finding import find_adaptation
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.engine.build import count_on_meta
from lowmem_db.errors import StorageError
from lowmem_db.memory import sharding, techniques
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.disk import checkpoint_bytes, final_bytes
from lowmem_db.storage import hub
from lowmem_db.storage.atomic import as_storage_error
from lowmem_db.storage.disk import check_path
from lowmem_db.storage.run_folder import RunFolder


def check_machine(config: Config, device: torch.device) -> None:
    """Refuse what this machine cannot do, before a model is searched.

    Raises:
        BudgetError: Other programs hold the device's memory.
        ConfigError: The device does not support ``training.mixed_precision``.
        DependencyError: A library or login that was asked for is missing, torch is too old, or
            ``LOWMEM_DB_KERNELS`` asks for kernels that cannot run here.
        StorageError: The final model is to be uploaded, but nobody is logged in.
    """
    environment.check_room(device)
    environment.check_precision(config.training.mixed_precision or "no", device)
    techniques.check(config, device)
    if config.distributed.sharding == "full":
        sharding.check()
    if environment.will_compile(device):
        say(f"compiling kernels, once for {device} and this Triton: up to a minute, here and in the first step")
    environment.check_kernels(device)
    find_adaptation(config).check_machine(device)
    if config.logging.tensorboard:
        environment.require("tensorboard")
    if uses_wandb(config):
        environment.check_wandb()
    if config.final.push_to_hub:
        hub.check_login()


def check_folders(config: Config) -> None:
    """Refuse folders that this system cannot write, as Windows cannot write ``aux``; make that of the caches.

    Raises:
        StorageError: The message names the field.
    """
    fields = {"cache_dir": config.cache_dir, "checkpointing.copy_to": config.checkpointing.copy_to}
    for field, folder in fields.items():
        if folder is not None:
            check_path(folder.absolute(), field)
    try:
        config.cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cache_dir: {as_storage_error(error, config.cache_dir)}") from error


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
    trained = count_on_meta(config, model)
    return checkpoint_bytes(config, model, trained) + final_bytes(config, model, trained)
