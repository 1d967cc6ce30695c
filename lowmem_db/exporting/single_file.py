"""Exporting one file in the layout of the published models, for ComfyUI, AUTOMATIC1111, InvokeAI and diffusers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_db.console import say
from lowmem_db.errors import ModelError
from lowmem_db.exporting.casting import cast, stored_dtype
from lowmem_db.exporting.ldm_configuration import ldm_configuration
from lowmem_db.exporting.metadata import metadata_of
from lowmem_db.exporting.source import ExportSource, refuse_existing
from lowmem_db.models.families.original_layout import Entry, Layout
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.prediction import V_PREDICTION, ZERO_TERMINAL_SNR
from lowmem_db.models.stored_tensor import StoredTensor
from lowmem_db.models.stored_weights import stored_weights
from lowmem_db.storage.atomic import write_text
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
    beside = configuration_beside(source.model, out)
    tensors: dict[str, StreamedTensor] = {}
    for component in layout.prefixes:
        source.model.verify(component)
        weights = stored_weights(source.model, component)
        config = source.model.config_of(component)
        for entry in entries_of(layout, component, source.model, weights):
            tensors[entry.name] = _streamed(entry, weights, config, precision)
    for marker in markers_of(source.model):
        tensors[marker] = StreamedTensor((0,), torch.float32, lambda: torch.empty(0))
    write_streamed(out, tensors, metadata_of(source, layout))
    for file, text in beside.items():
        write_text(file, text)
        say(f"wrote {file}, which tells other programs that the model predicts v: keep it beside {out.name}")


def markers_of(model: ModelFolder) -> list[str]:
    """Return the names of the empty tensors that tell other programs what a model predicts; epsilon needs none."""
    scheduler = model.config_of("scheduler")
    if scheduler.get("prediction_type") != "v_prediction":
        return []
    return [V_PREDICTION, *([ZERO_TERMINAL_SNR] if scheduler.get("rescale_betas_zero_snr") else [])]


def configuration_beside(model: ModelFolder, out: Path) -> dict[Path, str]:
    """Return the file that has to lie beside a single file, with its text.

    Other programs look for the markers in SDXL's files only; for earlier models they read LDM's configuration.

    Raises:
        ModelError: The file exists.
    """
    if V_PREDICTION not in markers_of(model) or len(model.family.text_encoders) > 1:
        return {}
    file = out.with_suffix(".yaml")
    refuse_existing(file)
    return {file: ldm_configuration(model)}


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
