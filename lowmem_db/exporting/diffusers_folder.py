"""Exporting a folder in diffusers' layout, in any precision."""

import shutil
from pathlib import Path

import torch

from lowmem_db.exporting.casting import cast, stored_dtype
from lowmem_db.exporting.source import ExportSource, refuse_existing
from lowmem_db.models.stored_weights import read_header
from lowmem_db.storage.atomic import write_folder
from lowmem_db.storage.tensor_stream import StreamedTensor, write_streamed

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")


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
    write_folder(out, lambda temporary: _fill(source.model.path, temporary, precision))


def _fill(source: Path, folder: Path, precision: torch.dtype | None) -> None:
    for file in sorted(source.rglob("*")):
        target = folder / file.relative_to(source)
        if file.suffix == ".safetensors":
            _convert(file, target, precision)
        elif file.is_file() and file.suffix not in _WEIGHTS:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _convert(file: Path, target: Path, precision: torch.dtype | None) -> None:
    tensors, metadata = read_header(file)
    streamed = {}
    for name, tensor in tensors.items():
        dtype = stored_dtype(tensor.dtype, precision)
        streamed[name] = StreamedTensor(
            tensor.shape, dtype, lambda tensor=tensor, dtype=dtype: cast(tensor.name, tensor.read(), dtype)
        )
    write_streamed(target, streamed, metadata)
