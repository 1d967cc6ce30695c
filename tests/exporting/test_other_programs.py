"""What other programs make of our files: small twins of how they tell models apart and how they apply a LoRA.

The twins say what ComfyUI 0.3.64, Forge and AUTOMATIC1111 look at; none of their code is here.
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowmem_db.adaptation.lora_file import lora_file, put_into
from lowmem_db.adaptation.low_rank import merge, peft_settings
from lowmem_db.cli.train import train
from lowmem_db.exporting.extraction import bake_dora
from lowmem_db.exporting.lora import LoraSource, export_lora, kohya_metadata, kohya_state
from lowmem_db.exporting.request import Request, export_model
from lowmem_db.exporting.single_file import export_single_file
from lowmem_db.exporting.source import find_export_source
from lowmem_db.models.finding import find_model
from lowmem_db.models.names import published_name
from lowmem_db.models.single_file import recognise
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.tensors import read_tensors
from tests.adaptation.test_low_rank import KINDS, config_of, trained
from tests.original_models import scheduler_fields, write_original_model

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LOWMEM_DB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def comfy_sampling(tensors: Mapping[str, Tensor]) -> tuple[str, bool]:
    """What ComfyUI samples an SDXL file with: the kind of prediction, and whether the terminal SNR is zero."""
    if {"edm_mean", "edm_std"} <= tensors.keys():
        return "edm", False
    if "edm_vpred.sigma_max" in tensors:
        return "v over continuous noise", False
    return ("v", "ztsnr" in tensors) if "v_pred" in tensors else ("epsilon", False)


def forge_prediction(file: Path, detected: str) -> str:
    """What Forge samples with: a YAML beside the file can say v, in two forms; else what ComfyUI's rules detected."""
    beside = file.with_suffix(".yaml")
    params = yaml.safe_load(beside.read_text())["model"]["params"] if beside.is_file() else {}
    scaling = params.get("denoiser_config", {}).get("params", {}).get("scaling_config", {}).get("target", "")
    said = params.get("parameterization") or scaling
    return "v" if said == "v" or said.endswith(".VScaling") else detected


def forge_lora_family(metadata: Mapping[str, str]) -> str:
    """The family under which Forge lists a LoRA; it hides those of other families."""
    architecture = metadata.get("modelspec.architecture")
    if architecture == "stable-diffusion-xl-v1-base/lora" or metadata.get("ss_base_model_version", "")[:5] == "sdxl_":
        return "SDXL"
    if metadata.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if architecture == "stable-diffusion-v1/lora" else "unknown"


def with_markers(file: Path, **markers: Tensor) -> Path:
    """Rewrite a single file with more tensors, as other programs write them."""
    tensors, metadata = read_tensors(file)
    save_file({**tensors, **markers}, file, metadata)
    return file


def test_noobai_in_trained_and_out_is_sampled_as_v_prediction_with_zero_terminal_snr(
    tiny_fields: dict[str, object], tmp_path: Path
) -> None:
    """The file says epsilon in its metadata, as converters leave it: its tensors win."""
    base = tmp_path / "noob.safetensors"
    export_single_file(find_export_source(str(write_original_model(tmp_path / "m", "sdxl"))), base)
    assert comfy_sampling(load_file(base)) == ("epsilon", False)
    with_markers(base, v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
    (tmp_path / "noob.yaml").write_text("model: {params: {parameterization: eps}}")
    fields = tiny_fields | {"model.base": str(base), "training.max_train_steps": 1, "prior.enabled": False}
    train([f"{field}={json.dumps(value)}" for field, value in fields.items()])
    final = tmp_path / "run" / "final"
    scheduler = json.loads((final / "scheduler" / "scheduler_config.json").read_text())
    assert ZERO_SNR.items() <= scheduler.items()
    out = export_model(Request(source=str(tmp_path / "run"), out=tmp_path / "out.safetensors"))
    tensors = load_file(out)
    assert comfy_sampling(tensors) == ("v", True)
    assert forge_prediction(out, comfy_sampling(tensors)[0]) == "v"
    assert (tensors["v_pred"].shape, tensors["ztsnr"].shape) == ((0,), (0,))
    assert not out.with_suffix(".yaml").exists()
    again = recognise(out)
    assert ZERO_SNR.items() <= again.config_of("scheduler").items()
    loaded = StableDiffusionXLPipeline.from_single_file(str(out), config=str(final), local_files_only=True)
    assert loaded.scheduler.config["prediction_type"] == "v_prediction"
    for pipeline_class in (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting):
        draws_with(pipeline_class, final)


def draws_with(pipeline_class: Any, folder: Path) -> None:
    """Load a folder with one of diffusers' automatic pipelines, and draw with it."""
    pipeline = pipeline_class.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (32, 32), "white")
    given = {
        AutoPipelineForText2Image: {"height": 32, "width": 32},
        AutoPipelineForImage2Image: {"image": picture, "strength": 1.0},
        AutoPipelineForInpainting: {
            "image": picture,
            "mask_image": picture,
            "height": 32,
            "width": 32,
            "strength": 1.0,
        },
    }
    drawn = pipeline("a dog", num_inference_steps=2, output_type="pt", **given[pipeline_class])
    assert torch.isfinite(torch.as_tensor(drawn.images)).all()


@pytest.mark.parametrize("pipeline_class", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_every_automatic_pipeline_loads_a_model_that_came_as_a_single_file(pipeline_class: Any, tmp_path: Path) -> None:
    source = write_original_model(tmp_path / "m", "sd1")
    export_single_file(find_export_source(str(source)), tmp_path / "one.safetensors")
    draws_with(pipeline_class, find_model(str(tmp_path / "one.safetensors")).path)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_earlier_models_that_predict_v_have_a_configuration_beside_them(family: str, tmp_path: Path) -> None:
    source = write_original_model(tmp_path / "m", family)
    scheduler_fields(source, **ZERO_SNR)
    out = export_model(Request(source=str(source), out=tmp_path / "out.safetensors"))
    assert forge_prediction(out, "epsilon") == "v"
    assert "ztsnr" in load_file(out)
    params = yaml.safe_load(out.with_suffix(".yaml").read_text())["model"]["params"]
    unet = params["unet_config"]["params"]
    assert (unet["model_channels"], unet["channel_mult"], unet["attention_resolutions"]) == (8, [1, 2], [2])
    text_encoder = {"sd1": "FrozenCLIPEmbedder", "sd2": "FrozenOpenCLIPEmbedder"}[family]
    assert params["cond_stage_config"]["target"].endswith(text_encoder)
    assert str(tmp_path) not in out.with_suffix(".yaml").read_text()


def test_epsilon_needs_neither_markers_nor_configuration(tmp_path: Path) -> None:
    source = write_original_model(tmp_path / "m", "sd1")
    out = export_model(Request(source=str(source), out=tmp_path / "out.safetensors"))
    assert not {"v_pred", "ztsnr"} & load_file(out).keys()
    assert not out.with_suffix(".yaml").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    export_single_file(find_export_source(str(write_original_model(tmp_path / "m", "sd1"))), file)
    tensors, metadata = read_tensors(file)
    narrow = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(narrow, file, metadata)
    assert "weights that it holds in 8 bits (fp8) are widened to fp16" in recognise(file).remark
    found = load_file(find_model(str(file)).path / "unet" / "diffusion_pytorch_model.safetensors")
    expected = narrow["model.diffusion_model.out.2.weight"]
    assert found["conv_out.weight"].dtype == torch.float16
    assert torch.equal(found["conv_out.weight"].float(), expected.float())


# LoRA.


def lora_of(kind: str, base: Path) -> LoraSource:
    """Return a LoRA of all components of a model."""
    model, config = find_model(str(base)), config_of(**KINDS[kind])
    names = [model.family.denoiser, *model.family.text_encoders]
    modules: dict[str, nn.Module] = {name: model.load(name) for name in names}
    trained(modules, config)
    settings = peft_settings(config)
    return LoraSource(
        name="dog",
        lora=lora_file(modules, settings, dtype=torch.float32, base=SuggestedBase(fields={"base": str(base)})),
    )


def layers_by_key(base: Path, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights that ComfyUI and kohya's scripts find under the keys of a LoRA: underscores instead of dots."""
    model = find_model(str(base))
    return {
        f"{prefix}_{published_name(component, path).replace('.', '_')}": layer.weight
        for component, prefix in prefixes.items()
        for path, layer in model.load(component).named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def applied(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``W + alpha / rank * up @ down`` for every layer, as all of these programs compute it."""
    changed = {}
    for key in {name.partition(".")[0] for name in state}:
        down, up, alpha = (state[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        product = (up.flatten(1) @ down.flatten(1)).view_as(weights[key])
        changed[key] = weights[key] + alpha / down.shape[0] * product
    return changed


XL_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def test_every_key_of_a_lora_is_one_that_other_programs_look_for(tiny_sdxl: Path) -> None:
    source = lora_of("all layers", tiny_sdxl)
    state = kohya_state(source.lora)
    weights = layers_by_key(tiny_sdxl, XL_PREFIXES)
    assert {name.partition(".")[0] for name in state} <= weights.keys()
    assert {name.partition(".")[2] for name in state} == {"lora_down.weight", "lora_up.weight", "alpha"}
    merged = merged_weights(source, tiny_sdxl)
    for key, weight in applied(state, weights).items():
        torch.testing.assert_close(weight, merged[key], atol=1e-6, rtol=1e-5)


def merged_weights(source: LoraSource, base: Path) -> dict[str, Tensor]:
    """The weights with the LoRA merged by peft, by the keys of other programs."""
    model, found = find_model(str(base)), {}
    for component in source.lora.settings:
        module = model.load(component)
        put_into(component, module, source.lora)
        merge(module)
        prefix = (
            XL_PREFIXES[component] if len(source.lora.settings) > 2 else {"unet": "lora_unet"}.get(component, "lora_te")
        )
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found[f"{prefix}_{published_name(component, path).replace('.', '_')}"] = layer.weight
    return found


def test_dora_is_baked_into_a_lora_that_every_program_reads_alike(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lora_of("DoRA", tiny_model)
    folder = tmp_path / "dog"
    folder.mkdir()
    export_lora(source, folder / "pytorch_lora_weights.safetensors", "lora-diffusers")
    out = export_model(
        Request(source=str(folder), base=str(tiny_model), extract_rank=64, out=tmp_path / "whole.safetensors")
    )
    state = load_file(out)
    assert not [name for name in state if "dora_scale" in name]
    said = capsys.readouterr().err
    assert "rank 64 keeps 100.0% of the change of all" in said
    assert "baked into a plain LoRA of rank 64" in said
    weights = layers_by_key(tiny_model, {"unet": "lora_unet", "text_encoder": "lora_te"})
    merged = merged_weights(source, tiny_model)
    for key, weight in applied(state, weights).items():
        torch.testing.assert_close(weight, merged[key], atol=1e-4, rtol=1e-4)


def test_baked_dora_of_a_low_rank_says_how_much_it_keeps(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lora_of("DoRA", tiny_model)
    made, kept = bake_dora(source, find_model(str(tiny_model)), rank=1)
    assert 0.0 < kept["unet"].share < 0.95
    assert made.lora.settings["unet"] == {
        "r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    with pytest.raises(Exception, match=r"lora\.dora: true, but kohya's layout has no norms.*--merge"):
        kohya_state(source.lora)


@pytest.mark.parametrize(
    ("width", "family", "architecture"),
    [
        (768, "SD1", "stable-diffusion-v1/lora"),
        (1024, "SD2", "stable-diffusion-v2-512/lora"),
        (2048, "SDXL", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_programs_list_a_lora_under_its_family(width: int, family: str, architecture: str, tiny_model: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    source = lora_of("attention", tiny_model)
    state = {name: torch.zeros(4, width), name.replace("lora_A", "lora_B"): torch.zeros(8, 4)}
    metadata = kohya_metadata(LoraSource(name="dog", lora=source.lora.__class__(
        state=state, settings={"unet": source.lora.settings["unet"]}, base=SuggestedBase(), metadata={}
    )))  # fmt: skip
    assert forge_lora_family(metadata) == family
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.title"] == "dog"
    assert re.fullmatch("True|False", metadata["ss_v2"])


def test_a_sample_of_the_run_is_the_thumbnail(tiny_model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (600, 300), "red").save(tmp_path / "00-00.png")
    metadata = kohya_metadata(replace(lora_of("attention", tiny_model), sample=tmp_path / "00-00.png"))
    (text,) = json.loads(metadata["ssmd_cover_images"])
    assert metadata["modelspec.thumbnail"] == f"data:image/jpeg;base64,{text}"
    assert Image.open(BytesIO(base64.b64decode(text))).size == (256, 128)
    assert "modelspec.thumbnail" not in kohya_metadata(lora_of("attention", tiny_model))
