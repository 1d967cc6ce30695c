"""A flipped bit is found when a file is read, wherever it lies."""

import json
import random
from pathlib import Path

import pytest
import torch

from lowmem_db.errors import StorageError
from lowmem_db.storage import checksums
from lowmem_db.storage.checksums import MANIFEST, check_file, check_folder, of_bytes, of_file, write_checked_folder
from lowmem_db.storage.run_folder import MARKER, RunFolder
from lowmem_db.storage.tensors import TensorStore, read_state, write_state, write_tensors

TENSORS = {"mean": torch.arange(64.0).reshape(8, 8), "std": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0)}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def some_bits(path: Path, count: int = 40) -> list[int]:
    return random.Random(0).sample(range(8 * path.stat().st_size), count)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(path: Path) -> None:
        (path / "unet").mkdir()
        (path / "unet" / "weights").write_bytes(bytes(range(256)) * 20)
        (path / "model_index.json").write_text("{}")

    write_checked_folder(tmp_path / "final", write)
    return tmp_path / "final"


def test_checksum_is_the_crc_of_all_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check value of CRC-32 is that of its catalogues."""
    (tmp_path / "file").write_bytes(b"123456789")
    monkeypatch.setattr(checksums, "_CHUNK_BYTES", 4)
    assert of_file(tmp_path / "file") == of_bytes([b"1234", b"56789"]) == "crc32:cbf43926"


def test_a_flipped_bit_in_any_file_of_a_folder_is_found(folder: Path) -> None:
    assert check_folder(folder)
    for name in ("unet/weights", "model_index.json"):
        for bit in some_bits(folder / name, 16):
            flip(folder / name, bit)
            with pytest.raises(
                StorageError, match=rf"{name}: is damaged: its checksum is crc32:\w+, but {MANIFEST} has"
            ):
                check_folder(folder)
            flip(folder / name, bit)
    assert check_folder(folder)


def test_missing_file_and_damaged_manifest_are_found(folder: Path) -> None:
    (folder / "unet" / "weights").rename(folder / "gone")
    with pytest.raises(StorageError, match="unet/weights: does not exist"):
        check_folder(folder)
    for content in ("", "{", '{"a": 1}', '{"checksums": [1]}', '{"checksums": {"a": 1}}', "[" * 100_000):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(StorageError, match=rf"{MANIFEST}: is damaged"):
            check_folder(folder)


def test_manifest_that_names_files_elsewhere_is_refused(folder: Path) -> None:
    for name in ("../secret", "/etc/passwd", "unet/../../secret"):
        (folder / MANIFEST).write_text(json.dumps({"checksums": {name: "crc32:0"}}))
        with pytest.raises(StorageError, match="it names files outside its folder"):
            check_folder(folder)


def test_folder_of_an_older_version_is_not_checked(folder: Path) -> None:
    assert not check_folder(folder / "unet")
    (folder / "COMPLETE").write_text("500\n")
    assert not check_file(folder / "model_index.json", folder / "COMPLETE")


def test_file_that_the_manifest_does_not_know_is_refused(folder: Path) -> None:
    (folder / "more").touch()
    with pytest.raises(StorageError, match=r"more: is not listed in checksums\.json"):
        check_file(folder / "more", folder / MANIFEST)


def test_a_flipped_bit_in_a_state_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_checkpoint(3, lambda path: write_state(path / "optimizer.safetensors", {"m": torch.arange(100.0)}))
    file = run.checkpoint_dir(3) / "optimizer.safetensors"
    assert json.loads((run.checkpoint_dir(3) / MARKER).read_text())["step"] == 3
    for bit in some_bits(file):
        flip(file, bit)
        with pytest.raises(StorageError, match=r"optimizer\.safetensors: is damaged: its checksum is"):
            read_state(file)
        flip(file, bit)
    assert torch.equal(read_state(file)["m"], torch.arange(100.0))


def test_a_flipped_bit_in_the_cache_is_a_miss(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.write("abcd", TENSORS)
    file = store.path("abcd")
    for bit in some_bits(file, 80):
        flip(file, bit)
        found = store.read("abcd")
        assert found is None or all(torch.equal(found[name], TENSORS[name]) for name in TENSORS), bit
        flip(file, bit)
    assert store.read("abcd") is not None


def test_cache_of_an_older_version_is_read_with_one_remark(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = TensorStore(tmp_path)
    for key in ("abcd", "abce"):
        write_tensors(store.path(key), TENSORS)
        assert store.read(key) is not None
    assert capfd.readouterr().err == (
        f"{tmp_path}: holds files of an older version without checksums, which are not verified\n"
    )
