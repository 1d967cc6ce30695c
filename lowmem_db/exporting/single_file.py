"""Exporting one file in the layout of the published models, for ComfyUI, AUTOMATIC1111, InvokeAI and diffusers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_db.errors import ModelError
from lowmem_db.exporting.casting import cast, stored_dtype
from lowmem_db.exporting.metadata import metadata_of
from lowmem_db.exporting.source import ExportSource, refuse_existing
from lowmem_db.models.families.original_layout import Entry, Layout
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.stored_weights import StoredTensor, stored_weights
from lowmem_db.storage.tensor_stream import StreamedTensor, write_streamed

LOGIT_SCALE = math.log(100)
"""Logarithm of the greatest scale that CLIP's training allows (arXiv:2103.00020, section 2.5)."""


def export_single_file(source: ExportSource, out: Path, precision: torch.dtype | None = None) -> None:
    """Write a model as one safetensors file, with one tensor in memory at a time.

    Args:
        source: The model.
        out: The file to create.
        precision: Type of the weights. Default: unchanged.

    Raises:
        ModelError: ``out`` exists, the format cannot hold the model, or a weight does not fit into the precision.
        StorageError: The disk is full.
    """
    refuse_existing(out)
    layout = source.model.family.layout_of(source.model)
    tensors: dict[str, StreamedTensor] = {}
    for component in layout.prefixes:
        source.model.verify(component)
        weights = stored_weights(source.model, component)
        config = source.model.config_of(component)
        for entry in entries_of(layout, component, source.model, weights):
            tensors[entry.name] = _streamed(entry, weights, config, precision)
    write_streamed(out, tensors, metadata_of(source, layout))


def entries_of(layout: Layout, component: str, model: ModelFolder, names: dict[str, StoredTensor]) -> list[Entry]:
    """Return the tensors of a component in the single file.

    Raises:
        ModelError: The format has no place for one of its tensors.
    """
    try:
        return layout.entries(component, model.config_of(component), names)
    except KeyError as error:
        raise ModelError(
            f"{model.path / component}: a single file cannot hold {error.args[0]}; export --format diffusers"
        ) from error


def _streamed(
    entry: Entry, weights: dict[str, StoredTensor], config: dict[str, Any], precision: torch.dtype | None
) -> StreamedTensor:
    if not entry.sources:
        constant = _CONSTANTS[entry.form](config)
        if constant.is_floating_point():
            constant = constant.to(precision or next(iter(weights.values())).dtype)
        return StreamedTensor(tuple(constant.shape), constant.dtype, lambda: constant)
    sources = [weights[name] for name in entry.sources]
    dtype = stored_dtype(sources[0].dtype, precision)

    def make() -> Tensor:
        return cast(entry.name, entry.pack([source.read() for source in sources]), dtype)

    return StreamedTensor(entry.shape([source.shape for source in sources]), dtype, make)


_CONSTANTS: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "positions": lambda config: torch.arange(config["max_position_embeddings"])[None],
    "logit_scale": lambda config: torch.tensor(LOGIT_SCALE),
    "identity": lambda config: torch.eye(config["hidden_size"]),
}
