"""Writing a safetensors file tensor by tensor: one tensor is in memory at a time, however large the file is.

The layout follows https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the header,
and the tensors one after another.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowmem_db.errors import StorageError
from lowmem_db.storage.atomic import write_file

_DTYPE_NAMES = {  # in the order in which safetensors writes them
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
"""Types that fp16 holds exactly and that nothing computes in."""
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPE_NAMES)}
DTYPES_BY_NAME = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is computed when it is written.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        make: Computes the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_streamed(path: Path, tensors: Mapping[str, StreamedTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    The bytes are those that safetensors itself would write: wide types first, so that every tensor starts at a multiple
    of its own width.

    Raises:
        StorageError: The disk is full.
        ValueError: A tensor does not have the announced shape or type.
    """
    ordered = sorted(tensors.items(), key=lambda item: (_RANKS[item[1].dtype], item[0]))
    header = _header(ordered, metadata)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for name, streamed in ordered:
                tensor = streamed.make()
                if (tuple(tensor.shape), tensor.dtype) != (streamed.shape, streamed.dtype):
                    raise ValueError(f"{name}: {tensor.shape} {tensor.dtype} instead of {streamed}")
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    write_file(path, write)


def dtype_of_name(name: str, file: Path) -> torch.dtype:
    """Return the type for a name in a safetensors header.

    Raises:
        StorageError: The type is not supported.
    """
    if name not in DTYPES_BY_NAME:
        raise StorageError(f"{file}: holds tensors of type {name}; allowed: {', '.join(DTYPES_BY_NAME)}")
    return DTYPES_BY_NAME[name]


def _header(ordered: list[tuple[str, StreamedTensor]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.num_bytes
        dtype = _DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)
