"""Files written tensor by tensor are those that safetensors writes, byte for byte."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_db.errors import StorageError
from lowmem_db.storage.tensor_stream import StreamedTensor, dtype_of_name, write_streamed

TENSORS = {
    "z.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.half": torch.arange(5, dtype=torch.float16),
    "b.brain": torch.randn(2, 2, 2).to(torch.bfloat16),
    "ids": torch.arange(7)[None],
    "scalar": torch.tensor(4.6),
    "flag": torch.tensor([True, False, True]),
    "int": torch.tensor([1], dtype=torch.int32),
    "double": torch.tensor([1.0], dtype=torch.float64),
    "byte": torch.tensor([1], dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
    "narrow": torch.arange(3.0).to(torch.float8_e4m3fn),
    "narrower": torch.arange(3.0).to(torch.float8_e5m2),
    "small": torch.tensor([1], dtype=torch.int8),
    "short": torch.tensor([1], dtype=torch.int16),
}


def streamed(tensors: dict[str, Tensor]) -> dict[str, StreamedTensor]:
    return {name: StreamedTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def test_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    write_streamed(tmp_path / "ours.safetensors", streamed(TENSORS), {"format": "pt"})
    save_file(TENSORS, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    write_streamed(tmp_path / "f", streamed({"t": matrix.T, "part": matrix[1:]}), {})
    found = load_file(tmp_path / "f")
    assert torch.equal(found["t"], matrix.T)
    assert torch.equal(found["part"], matrix[1:])


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16)])
def test_tensor_that_is_not_as_announced_leaves_no_file(wrong: Tensor, tmp_path: Path) -> None:
    announced = {"weight": StreamedTensor((2, 3), torch.float32, lambda: wrong)}
    with pytest.raises(ValueError, match="weight"):
        write_streamed(tmp_path / "f", announced, {})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"):
        write_streamed(tmp_path / "f", {"weight": StreamedTensor((2,), torch.float32, failing())}, {})
    assert list(tmp_path.iterdir()) == []


def failing() -> Callable[[], Tensor]:
    def make() -> Tensor:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return make


def test_types_that_hold_no_weights_are_refused_by_name() -> None:
    assert dtype_of_name("BF16", Path("f")) == torch.bfloat16
    with pytest.raises(StorageError, match="f: holds tensors of type F8_E8M0; allowed: I64, F64, F32"):
        dtype_of_name("F8_E8M0", Path("f"))
