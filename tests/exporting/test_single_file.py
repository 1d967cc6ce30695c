"""What is exported loads through diffusers' own single-file loading, tensor for tensor."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowmem_db.errors import ModelError
from lowmem_db.exporting.single_file import export_single_file
from lowmem_db.exporting.source import find_export_source
from tests.original_models import write_original_model

PIPELINES = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: write_original_model(folder / family, family) for family in PIPELINES}


def export(folder: Path, file: Path, dtype: torch.dtype | None = None) -> Path:
    export_single_file(find_export_source(str(folder)), file, dtype)
    return file


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as weights:
        return weights.metadata()


@pytest.mark.parametrize("family", list(PIPELINES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_diffusers_loads_every_tensor(family: str, dtype: torch.dtype, models: dict[str, Path], tmp_path: Path) -> None:
    file = export(models[family], tmp_path / "one.safetensors", dtype)
    options = {"local_files_only": True, "torch_dtype": dtype}
    loaded = PIPELINES[family].from_single_file(str(file), config=str(models[family]), **options)
    expected = PIPELINES[family].from_pretrained(models[family], **options)
    for name in MODULES[: 4 if family == "sdxl" else 3]:
        found, wanted = getattr(loaded, name).state_dict(), getattr(expected, name).state_dict()
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(found[key], wanted[key]), (name, key)


@pytest.mark.parametrize("family", list(PIPELINES))
def test_types_stay_unless_another_is_asked_for(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    kept = load_file(export(models[family], tmp_path / "kept.safetensors"))
    half = load_file(export(models[family], tmp_path / "half.safetensors", torch.float16))
    assert {tensor.dtype for tensor in kept.values()} <= {torch.float32, torch.int64}
    assert {tensor.dtype for tensor in half.values() if tensor.numel()} <= {torch.float16, torch.int64}


def test_same_model_gives_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    one, other = (export(models["sd1"], tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_what_open_clip_has_besides_is_there(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(export(models["sd2"], tmp_path / "one.safetensors"))
    block = "cond_stage_model.model.transformer.resblocks.{}.{}"
    for name in ("attn.in_proj_weight", "mlp.c_fc.bias"):
        assert torch.equal(tensors[block.format(23, name)], tensors[block.format(22, name)])
    assert torch.equal(tensors["cond_stage_model.model.text_projection"], torch.eye(24))
    assert tensors["cond_stage_model.model.logit_scale"].item() == pytest.approx(4.6052, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "architecture", "prediction_type"),
    [
        ("sd1", "stable-diffusion-v1", "epsilon"),
        ("sd2", "stable-diffusion-v2-512-v", "v"),
        ("sdxl", "stable-diffusion-xl-v1-base", "epsilon"),
    ],
)
def test_metadata_follow_model_spec(
    family: str, architecture: str, prediction_type: str, models: dict[str, Path], tmp_path: Path
) -> None:
    found = metadata(export(models[family], tmp_path / "one.safetensors"))
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == architecture
    assert found["modelspec.prediction_type"] == prediction_type
    assert found["modelspec.title"] == family
    assert found["modelspec.resolution"] == "32x32"
    assert set(json.loads(found["lowmem_db.components"])) >= {"unet", "vae", "text_encoder", "scheduler"}


def test_metadata_tell_nothing_of_this_machine(tmp_path: Path) -> None:
    model = write_original_model(tmp_path / "model", "sd1")
    for component in ("unet", "vae", "text_encoder"):
        file = model / component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "/home/somebody/models"}))
    found = metadata(export(model, tmp_path / "one.safetensors"))
    assert not any("somebody" in value or str(tmp_path) in value for value in found.values())


def test_autoencoders_with_old_names_and_convolutions_are_understood(models: dict[str, Path], tmp_path: Path) -> None:
    expected = load_file(export(models["sd1"], tmp_path / "new.safetensors"))
    old = write_original_model(tmp_path / "old", "sd1")
    file = old / "vae" / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(file)
    for new, ancient in names.items():
        tensors = {name.replace(new, ancient): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    found = load_file(export(old, tmp_path / "old.safetensors"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_in_numbered_parts_are_joined(models: dict[str, Path], tmp_path: Path) -> None:
    parts = write_original_model(tmp_path / "parts", "sd1")
    file = parts / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = list(load_file(file).items())
    for number in (0, 1):
        save_file(dict(tensors[number::2]), file.with_name(f"{file.stem}-0000{number + 1}-of-00002.safetensors"))
    file.unlink()
    one, other = export(models["sd1"], tmp_path / "a.safetensors"), export(parts, tmp_path / "b.safetensors")
    assert all(torch.equal(tensor, load_file(other)[name]) for name, tensor in load_file(one).items())


# What is refused.


def test_nothing_is_overwritten(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(ModelError, match=r"--out: .*there\.safetensors exists and will not be overwritten"):
        export(models["sd1"], tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_weight_beyond_half_precision_is_refused(tmp_path: Path) -> None:
    model = write_original_model(tmp_path / "model", "sd1")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = 1e6
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"--precision: model\.diffusion_model\.input_blocks\.0\.0\.bias has values"):
        export(model, tmp_path / "one.safetensors", torch.float16)
    assert not (tmp_path / "one.safetensors").exists()
    export(model, tmp_path / "one.safetensors", torch.bfloat16)


def test_model_whose_tokenizer_is_not_clips_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has 514 tokens; .* export --format diffusers"):
        export(tiny_model, tmp_path / "one.safetensors")


def test_demo_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a single file cannot hold AutoencoderTAEF2; export --format"):
        export_single_file(find_export_source("demo"), tmp_path / "one.safetensors")


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_folder_whose_weights_are_not_those_of_its_configuration_is_refused(damage: str, tmp_path: Path) -> None:
    model = write_original_model(tmp_path / "model", "sd1")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    bias = tensors.pop("conv_in.bias")
    save_file(tensors if damage == "missing" else tensors | {"conv_in.bias": bias[:-1]}, file)
    with pytest.raises(
        ModelError,
        match=r"unet: (its weight files lack 1 tensor, such as conv_in\.bias|conv_in\.bias is \[7\], but config\.json)",
    ):
        export(model, tmp_path / "one.safetensors")


def test_part_of_a_model_that_has_no_place_is_named(tmp_path: Path) -> None:
    model = write_original_model(tmp_path / "model", "sd1")
    file = model / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time_cond_proj_dim": 8}))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"time_embedding.cond_proj.weight": torch.zeros(8, 8)}, weights)
    with pytest.raises(ModelError, match=r"unet: a single file cannot hold time_embedding\.cond_proj\.weight"):
        export(model, tmp_path / "one.safetensors")
