"""The base model of a run: found wherever it is now, and refused if its bytes are not those it had."""

from typing import Any

from lowmem_db.config.loading import read_yaml
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.errors import CheckpointError, ModelError
from lowmem_db.models.finding import model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.storage.run_folder import RunFolder

FIELDS = ("model.base", "model.vae", "model.revision", "model.variant", "model.content_key")
"""Fields that may change during a run, as long as the bytes are the same."""


def recorded_model(run: RunFolder) -> dict[str, Any]:
    """Return the fields of ``model`` that a run with checkpoints has written; none if it has not recorded its bytes."""
    if not run.complete_steps():
        return {}
    fields = read_yaml(run.config_file).get("model")
    return fields if isinstance(fields, dict) and fields.get("content_key") else {}


def find_base_of(run: RunFolder, config: Config) -> tuple[ModelFolder, Config]:
    """Find the base model; return the configuration with the key of its bytes.

    Raises:
        CheckpointError: The run started from a model with other bytes.
        ModelError: It does not exist, its files do not fit together, or it is not the one of ``model.content_key``.
    """
    before = recorded_model(run)
    try:
        model = model_of(config)
    except ModelError as error:
        if not before:
            raise
        raise ModelError(f"{error}. If the base of {run.root} has moved, say where it is with --base") from error
    if before and before["content_key"] != model.bytes_key:
        raise CheckpointError(
            f"--resume: model.base: {config.model.base} has other bytes than the model that {run.root} started from "
            f"({before.get('base')}); allowed: a copy of that model. Say where one is with --base, or choose another "
            "output_dir"
        )
    if config.model.content_key not in (None, model.bytes_key):
        raise ModelError(
            f"model.content_key: {config.model.content_key}, but the bytes of {config.model.base} have the key "
            f"{model.bytes_key}; allowed: the model that the configuration was made with. Name it in model.base, or "
            "set model.content_key=null"
        )
    if before and before.get("base") != config.model.base:
        say(f"resume: model.base was {before.get('base')!r}, is now {config.model.base!r}, with the same bytes")
    return model, config.model_copy(update={"model": config.model.model_copy(update={"content_key": model.bytes_key})})
