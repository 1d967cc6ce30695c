"""Tensors in safetensors files: a content-addressed store, and nested states.

A file that cannot be read completely counts as missing, and the caller makes it again.
"""

import json
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowmem_db.console import say
from lowmem_db.errors import NonFiniteError, StorageError
from lowmem_db.finite import first_not_finite
from lowmem_db.storage.atomic import write_file
from lowmem_db.storage.checksums import check_file, of_bytes
from lowmem_db.storage.locks import locked
from lowmem_db.storage.run_folder import MARKER

_CHECKSUM = "checksum"
_LOCKS = ".locks"  # one per key prefix: their number is bounded, so none needs to be deleted
_Identity = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class TensorStore:
    """Small groups of tensors by content key: ``root/ab/abcdef….safetensors``.

    Args:
        root: Folder of the store; created when the first group is written.
        needed: Names that a group must have; those of older versions may lack some, and count as missing.
    """

    def __init__(self, root: Path, needed: Collection[str] = ()) -> None:
        self.root = root
        self.needed = frozenset(needed)

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.root / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a key, or None if the file is missing, damaged, or holds infinite values or NaN."""
        try:
            mapped, metadata = read_tensors(self.path(key))
        except StorageError:
            return None
        found = {
            name: tensor.clone() for name, tensor in mapped.items()
        }  # mapped tensors become invalid with their file
        if _CHECKSUM not in metadata:
            _say_once(f"{self.root}: holds files of an older version without checksums, which are not verified")
        elif metadata[_CHECKSUM] != _checksum(found):
            return None
        is_usable = found.keys() >= self.needed and first_not_finite(found) is None
        return found if is_usable else None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a key atomically, with their checksum.

        Raises:
            NonFiniteError: One holds infinite values or NaN.
            StorageError: The disk is full.
        """
        if (name := first_not_finite(tensors)) is not None:
            raise NonFiniteError(f"{self.path(key)}: is not written, because {name} is infinite or NaN")
        write_tensors(self.path(key), tensors, {_CHECKSUM: _checksum(tensors)})

    def read_or_make(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a key; if they are missing or damaged, one process makes them.

        Args:
            key: Their content key.
            make: Makes the tensors; called while other processes wait for this key.
        """
        found = self.read(key)
        if found is not None:
            return found
        with locked(self.root / _LOCKS / f"{key[:2]}.lock"):
            found = self.read(key)  # another process may have made it in the meantime
            if found is None:
                self.write(key, make())
                found = self.read(key)
        if found is None:
            raise StorageError(f"{self.path(key)}: was written but cannot be read; check the disk")
        return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes."""
    own = _without_shared_memory(tensors)

    def write(temporary: Path) -> None:
        save_file(own, temporary, dict(metadata or {}))
        _sort_metadata(temporary)

    write_file(path, write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place, because the library writes it in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata.

    Raises:
        StorageError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise StorageError(f"{path}: does not exist") from None
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path}: is damaged ({error}); delete it") from error


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state (mappings and lists of tensors and JSON values) as one safetensors file.

    Tensors that share memory, as bitsandbytes' code maps do, are written once.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[_Identity, str] = {}
    skeleton = _take_tensors(state, tensors, names)
    write_tensors(path, tensors, {"state": json.dumps(skeleton)})


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`write_state` wrote; in a checkpoint, verify its checksum first.

    Raises:
        StorageError: The file is missing or damaged.
    """
    check_file(path, path.parent / MARKER)
    tensors, metadata = read_tensors(path)
    if "state" not in metadata:
        raise StorageError(f"{path}: holds no state; delete it")
    try:
        state = _put_tensors(json.loads(metadata["state"]), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{path}: holds no readable state ({_in_a_line(error)}); delete it") from error
    if not isinstance(state, dict):
        raise StorageError(f"{path}: holds {type(state).__name__} instead of a state; delete it")
    return state


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that overlap another one, which safetensors refuses; neighbours in one buffer are fine."""
    own: dict[str, Tensor] = {}
    taken: dict[int, list[tuple[int, int]]] = {}
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        start, stop = contiguous.data_ptr(), contiguous.data_ptr() + contiguous.nbytes
        others = taken.setdefault(contiguous.untyped_storage().data_ptr(), [])
        overlaps = any(start < other_stop and other_start < stop for other_start, other_stop in others)
        own[name] = contiguous.clone() if overlaps else contiguous
        others.append((start, stop))
    return own


def _take_tensors(value: Any, tensors: dict[str, Tensor], names: dict[_Identity, str]) -> Any:
    if isinstance(value, Tensor):
        identity = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() == 0 or identity not in names:
            names[identity] = str(len(tensors))
            tensors[names[identity]] = value
        return {"tensor": names[identity]}
    if isinstance(value, Mapping):
        return {"items": [[key, _take_tensors(item, tensors, names)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_take_tensors(item, tensors, names) for item in value]}
    return {"value": value}


def _put_tensors(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(skeleton, dict) or len(skeleton) != 1:
        raise ValueError("its skeleton is malformed")
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: _put_tensors(item, tensors) for key, item in content}
    if kind == "list":
        return [_put_tensors(item, tensors) for item in content]
    if kind == "value":
        return content
    raise ValueError(f"its skeleton contains {kind!r}")


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of tensors on the CPU: their names, types, shapes and bytes."""
    parts: list[bytes | memoryview] = []
    for name, tensor in sorted(tensors.items()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        parts.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return of_bytes(parts)


@cache
def _say_once(message: str) -> None:
    say(message)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
