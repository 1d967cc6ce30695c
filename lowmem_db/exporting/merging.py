"""Merging a LoRA into its base model."""

from pathlib import Path

import torch

from lowmem_db.adaptation.lora_file import put_into
from lowmem_db.adaptation.low_rank import merge
from lowmem_db.exporting.extraction import base_of_lora
from lowmem_db.exporting.lora import LoraSource
from lowmem_db.exporting.source import refuse_existing
from lowmem_db.models.saving import save_model
from lowmem_db.storage.atomic import write_folder


def merge_into_folder(
    source: LoraSource, out: Path, precision: torch.dtype = torch.float32, base: str | None = None
) -> None:
    """Write the base model of a LoRA as a folder in diffusers' layout, with the LoRA added to its weights in fp32.

    Args:
        source: The LoRA.
        out: The folder to create.
        precision: Type of the components that have changed.
        base: The base model. Default: that of the run, or the local one whose content key the LoRA holds.

    Raises:
        ModelError: The base model does not exist or must be named, or ``out`` exists.
        StorageError: The disk is full.
    """
    refuse_existing(out)
    model = base_of_lora(source, base)
    merged = {}
    for component in source.lora.settings:
        merged[component] = model.load(component)
        put_into(component, merged[component], source.lora)
        merge(merged[component])
    write_folder(
        out,
        lambda folder: save_model(
            folder,
            model,
            merged,
            dtype=precision,
            objective=None if source.config is None else source.config.objective,
        ),
    )
