"""The tensors of a safetensors file, by its header: names, shapes and types at once, values one by one."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowmem_db.models.files import damaged
from lowmem_db.storage.tensor_stream import dtype_of_name


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, described by the header.

    Attributes:
        file: The file.
        name: Its name there.
        shape: Its shape.
        dtype: Its type.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Return the tensor, memory-mapped rather than copied."""
        with safe_open(self.file, framework="pt") as weights:
            return weights.get_tensor(self.name)


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file from its header, without reading weights.

    Raises:
        ModelError: It is truncated, or not a safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata() or {}
            tensors = {}
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                dtype = dtype_of_name(part.get_dtype(), file)
                tensors[name] = StoredTensor(file, name, tuple(part.get_shape()), dtype)
            return tensors, metadata
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error
