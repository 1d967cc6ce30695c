"""A folder in diffusers' layout: copied, or in another precision."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lowmem_db.errors import ModelError
from lowmem_db.exporting.diffusers_folder import export_diffusers
from lowmem_db.exporting.source import find_export_source


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_without_a_precision_it_is_a_copy(tiny_model: Path, tmp_path: Path) -> None:
    export_diffusers(find_export_source(str(tiny_model)), tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tiny_model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_converted_and_the_pipeline_loads(dtype: torch.dtype, tiny_model: Path, tmp_path: Path) -> None:
    export_diffusers(find_export_source(str(tiny_model)), tmp_path / "half", dtype)
    for file in tiny_model.rglob("*.safetensors"):
        wanted, found = load_file(file), load_file(tmp_path / "half" / file.relative_to(tiny_model))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in wanted.items())
    StableDiffusionPipeline.from_pretrained(tmp_path / "half", local_files_only=True, torch_dtype=dtype)


def test_pickled_weights_do_not_travel(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    export_diffusers(find_export_source(str(tiny_model)), source)
    (source / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    export_diffusers(find_export_source(str(source)), tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tiny_model)


def test_nothing_is_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"--out: .* exists and will not be overwritten; choose another path, or delete it"
    ):
        export_diffusers(find_export_source(str(tiny_model)), tmp_path)
    assert json.loads((tiny_model / "model_index.json").read_text())
