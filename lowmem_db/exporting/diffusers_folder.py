"""Exporting a folder in diffusers' layout, in any precision."""

from pathlib import Path

import torch

from lowmem_db.exporting.casting import cast, stored_dtype
from lowmem_db.exporting.source import ExportSource, refuse_existing
from lowmem_db.models.copying import copy_known_files
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.stored_tensor import read_header
from lowmem_db.storage.atomic import write_folder
from lowmem_db.storage.checksums import MANIFEST, check_folder
from lowmem_db.storage.tensor_stream import StreamedTensor, write_streamed


def export_diffusers(source: ExportSource, out: Path, precision: torch.dtype | None = None) -> None:
    """Copy a model's folder, converting its weights one tensor at a time.

    Args:
        source: The model.
        out: The folder to create.
        precision: Type of the weights. Default: unchanged.

    Raises:
        ModelError: ``out`` exists, or a weight does not fit into the precision.
        StorageError: The disk is full.
    """
    refuse_existing(out)
    write_folder(out, lambda temporary: _fill(source.model, temporary, precision))


def _fill(source: ModelFolder, folder: Path, precision: torch.dtype | None) -> None:
    check_folder(source.path)
    parts = [part for part in sorted(source.path.iterdir()) if part.is_dir() and not part.name.startswith(".")]
    for part in (source.path, *parts):
        target = folder / part.relative_to(source.path)
        copy_known_files(part, target, root=source.path, weights=False)
        for file in sorted(part.glob("*.safetensors")):
            _convert(file, target / file.name, precision)
    (folder / MANIFEST).unlink(missing_ok=True)  # of other weights


def _convert(file: Path, target: Path, precision: torch.dtype | None) -> None:
    tensors, metadata = read_header(file)
    streamed = {}
    for name, tensor in tensors.items():
        dtype = stored_dtype(tensor.dtype, precision)
        streamed[name] = StreamedTensor(
            tensor.shape, dtype, lambda tensor=tensor, dtype=dtype: cast(tensor.name, tensor.read(), dtype)
        )
    write_streamed(target, streamed, metadata)
