"""Tensors and nested states in safetensors files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_db import environment
from lowmem_db.errors import StorageError
from lowmem_db.storage.tensors import (
    TensorStore,
    _without_shared_memory,
    read_state,
    read_tensors,
    write_state,
    write_tensors,
)

DAMAGES = {
    "empty": b"",
    "garbage": b"this is not a safetensors file, but long enough to be one",
    "header too long": (1 << 60).to_bytes(8, "little") + b"{}",
    "no json": (4).to_bytes(8, "little") + b"{{{{",
}


def assert_same(found: Any, wanted: Any) -> None:
    """Compare nested states: tensors bit for bit, tuples come back as lists."""
    if isinstance(wanted, Tensor):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted
        assert type(found) is type(wanted)


def round_trip(path: Path, state: dict) -> dict:
    write_state(path / "state.safetensors", state)
    return read_state(path / "state.safetensors")


def test_nested_state_comes_back(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "m": matrix}, 7: {"step": 3, "m": matrix.bfloat16()}},
        "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999), "name": "unet", "params": [0, 7], "fused": None}],
        "nested": [[], {}, (), [True, False], "süß", ""],
        "types": [torch.tensor([1, 2], dtype=dtype) for dtype in (torch.uint8, torch.int64, torch.float16, torch.bool)],
        1: "an int as key",
    }
    assert_same(round_trip(tmp_path, state), state)


def test_empty_tensors_keep_their_shapes(tmp_path: Path) -> None:
    state = {
        "a": torch.empty(0),
        "b": torch.empty(0, 3),
        "c": torch.empty(2, 0, dtype=torch.int32),
        "d": torch.empty(0),
    }
    assert_same(round_trip(tmp_path, state), state)


def test_shared_tensor_is_written_once_and_read_as_one(tmp_path: Path) -> None:
    shared = torch.arange(1000.0)
    found = round_trip(tmp_path, {"a": shared, "b": {"c": shared}})
    assert found["a"] is found["b"]["c"]
    assert (tmp_path / "state.safetensors").stat().st_size < 2 * shared.nbytes


def test_tensors_in_each_other_s_memory_are_kept_apart(tmp_path: Path) -> None:
    base = torch.arange(9.0).reshape(3, 3)
    state = {"base": base, "transposed": base.T, "row": base[0], "column": base[:, 0], "flat": base.flatten()}
    assert_same(round_trip(tmp_path, state), state)


def test_parameters_come_back_without_their_graph(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    found = round_trip(tmp_path, {"weight": weight, "product": weight * 2})
    assert not found["weight"].requires_grad
    assert torch.equal(found["product"], torch.full((2,), 2.0))


@pytest.mark.skipif(not environment.is_installed("bitsandbytes"), reason="needs bitsandbytes")
def test_state_of_8_bit_adamw_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(128, 64), nn.Linear(8, 8)]  # large enough for 8 bits, and too small
    optimizer = environment.require("bitsandbytes").optim.AdamW8bit(
        [{"params": module.parameters(), "name": str(index)} for index, module in enumerate(modules)]
    )
    for module in modules:
        module(torch.randn(4, module.in_features)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    found = round_trip(tmp_path, state)
    assert torch.uint8 in {tensor.dtype for tensor in read_tensors(tmp_path / "state.safetensors")[0].values()}
    assert_same(found, state)
    optimizer.load_state_dict(found)
    assert_same(optimizer.state_dict(), state)


def test_half_precision_is_kept_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        found = round_trip(tmp_path, {"a": bits.view(dtype)})["a"]
        assert torch.equal(found.view(torch.int16), bits)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(DAMAGES[damage])
    for read in (read_tensors, read_state):
        with pytest.raises(StorageError, match=r"state\.safetensors: is damaged \(.*\); delete it"):
            read(path)


@pytest.mark.parametrize("kept", [1, 7, 8, 60, -1])
def test_cut_file_is_an_error_and_a_cache_miss(tmp_path: Path, kept: int) -> None:
    store = TensorStore(tmp_path)
    store.write("abcd", {"a": torch.ones(100)})
    path = store.path("abcd")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StorageError, match="is damaged"):
        read_tensors(path)
    assert store.read("abcd") is None
    store.write("abcd", {"a": torch.ones(100)})
    assert_same(store.read("abcd"), {"a": torch.ones(100)})


def test_tensors_without_a_state_are_no_state(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", {"a": torch.ones(1)})
    with pytest.raises(StorageError, match="holds no state"):
        read_state(tmp_path / "weights.safetensors")


ODD_SKELETONS = [
    "", "null", "3", "[]", "{}", '{"tensor": "7"}', '{"tensor": [1]}', '{"items": 3}', '{"items": [1]}',
    '{"items": [["a"]]}', '{"items": [[{}, {"value": 1}]]}', '{"list": null}', '{"other": 1}', '{"value": 1, "x": []}',
    '{"list": [{"value": 1}]}', '{"value": {"a": 1}, "x": 2}', '{"tensor": "0"}', '{"value": 5}', '{"items": {"a": 1}}',
    '{"list": [' * 3000 + "]}" * 3000, "[" * 100_000, '{"items": [["a", {"tensor": "9"}]]}',
]  # fmt: skip


@pytest.mark.parametrize("skeleton", ODD_SKELETONS)
def test_odd_skeleton_is_no_state(tmp_path: Path, skeleton: str) -> None:
    write_tensors(tmp_path / "state.safetensors", {"0": torch.ones(1)}, {"state": skeleton})
    with pytest.raises(StorageError, match=r"state\.safetensors: holds .*; delete it") as refused:
        read_state(tmp_path / "state.safetensors")
    assert "\n" not in str(refused.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing\.safetensors: does not exist"):
        read_tensors(tmp_path / "nothing.safetensors")
    assert TensorStore(tmp_path).read("abcd") is None


def test_a_folder_in_the_place_of_a_file_is_a_cache_miss(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.path("abcd").mkdir(parents=True)
    assert store.read("abcd") is None


def test_neighbours_in_one_buffer_are_written_without_a_copy(tmp_path: Path) -> None:
    buffer = torch.arange(1024, dtype=torch.uint8)
    state = {"a": buffer[:256], "b": buffer[256:512].view(torch.int32), "c": buffer[128:384], "empty": buffer[:0]}
    own = _without_shared_memory(state)
    assert [own[name].data_ptr() == state[name].data_ptr() for name in ("a", "b", "c")] == [True, True, False]
    write_state(tmp_path / "state.safetensors", state)
    assert_same(read_state(tmp_path / "state.safetensors"), state)


def test_same_tensors_and_metadata_make_the_same_bytes(tmp_path: Path) -> None:
    """The library itself puts metadata in an order of chance."""
    metadata = {f"key {index}": f"vælue\n{index}" for index in range(12)}
    for name in ("a", "b"):
        write_tensors(tmp_path / name, {"x": torch.arange(3.0)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors, found = read_tensors(tmp_path / "a")
    assert found == metadata
    assert torch.equal(tensors["x"], torch.arange(3.0))
