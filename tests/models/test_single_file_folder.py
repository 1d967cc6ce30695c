"""From a single file to a folder of the cache: the same bytes, once, and nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_db.errors import StorageError
from lowmem_db.exporting.single_file import export_single_file
from lowmem_db.exporting.source import find_export_source
from lowmem_db.models import single_file_folder
from lowmem_db.models.finding import find_model
from lowmem_db.models.single_file_folder import folder_of_file
from tests.original_models import scheduler_fields, write_original_model

FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LOWMEM_DB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def export(folder: Path, file: Path) -> Path:
    export_single_file(find_export_source(str(folder)), file)
    return file


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_gives_the_same_bytes(family: str, dtype: torch.dtype, cache: Path, tmp_path: Path) -> None:
    source = write_original_model(tmp_path / "source", family, dtype=dtype)
    back = find_model(str(export(source, tmp_path / "one.safetensors")))
    assert weights(back.path) == weights(source)
    assert back.family == find_model(str(source)).family
    for component in (each.name for each in back.family.components):
        expected = find_model(str(source)).config_of(component)
        assert back.config_of(component) == {key: value for key, value in expected.items() if key != "_name_or_path"}


def test_zero_terminal_snr_comes_back(cache: Path, tmp_path: Path) -> None:
    source = write_original_model(tmp_path / "source", "sd2")
    scheduler_fields(source, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    folder = folder_of_file(export(source, tmp_path / "one.safetensors"))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_second_time_nothing_is_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = export(write_original_model(tmp_path / "source", "sd1"), tmp_path / "one.safetensors")
    first = folder_of_file(file)
    assert "writing it once as a folder in diffusers' layout" in capsys.readouterr().err
    monkeypatch.setattr(single_file_folder, "write_checked_folder", None)
    assert folder_of_file(file) == first


def test_other_bytes_have_another_folder(cache: Path, tmp_path: Path) -> None:
    file = export(write_original_model(tmp_path / "source", "sd1"), tmp_path / "one.safetensors")
    first = folder_of_file(file)
    tensors = load_file(file)
    tensors["first_stage_model.quant_conv.bias"] += 1
    save_file(tensors, file, metadata_of(file))
    second = folder_of_file(file)
    assert first != second
    assert (
        weights(first)["unet/diffusion_pytorch_model.safetensors"]
        == (weights(second)["unet/diffusion_pytorch_model.safetensors"])
    )
    assert weights(first) != weights(second)


def metadata_of(file: Path) -> dict[str, str]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def test_full_disk_leaves_no_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = export(write_original_model(tmp_path / "source", "sd1"), tmp_path / "one.safetensors")

    def write_some(model: object, folder: Path) -> None:
        (folder / "model_index.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_file_folder, "write_model", write_some)
    with pytest.raises(StorageError, match="the disk is full"):
        folder_of_file(file)
    assert [path for path in (cache / "models").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_are_those_the_families_were_trained_with(family: str, cache: Path, tmp_path: Path) -> None:
    source = write_original_model(tmp_path / "source", family)
    model = find_model(str(export(source, tmp_path / "one.safetensors")))
    tokenizer = model.load("tokenizer")
    ids = tokenizer("a sks dog", padding="max_length", max_length=8).input_ids
    end = 49407
    padding = 0 if family == "sd2" else end
    assert ids == [49406, 320, 48136, 1929, end, padding, padding, padding]


def test_cache_of_the_configuration_is_used(cache: Path, tmp_path: Path) -> None:
    source = write_original_model(tmp_path / "source", "sd1")
    file = export(source, tmp_path / "one.safetensors")
    assert find_model(str(file), cache_dir=tmp_path / "own").path.parent == tmp_path / "own" / "models"
    assert not cache.exists()
