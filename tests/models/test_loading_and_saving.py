"""Components from disk, and a trained model back to disk: what other tools find there."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lowmem_db import models
from lowmem_db.config.schema import Weights
from lowmem_db.errors import ModelError
from lowmem_db.models.families import find_family
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import load_noise_schedule
from lowmem_db.models.reading import converted
from lowmem_db.models.saving import DTYPES, published_state, save_model
from lowmem_db.optimizers import weights
from tests.faults import ERRORS, Fault
from tests.tiny_models import write_tiny_model

CONFIGS = Path(__file__).parents[1] / "assets" / "model_configs"
WITH_WEIGHTS = ("unet", "text_encoder", "vae")


def changed(module: nn.Module) -> nn.Module:
    """Return a module as training leaves it: other weights than those on disk."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("precision", DTYPES)
def test_saved_model_loads_as_a_pipeline_with_every_tensor_equal(
    tiny_model: Path, tmp_path: Path, precision: str
) -> None:
    source, dtype = find_model(str(tiny_model)), DTYPES[precision]
    trained = {"unet": changed(source.load("unet")), "text_encoder": changed(source.load("text_encoder"))}
    save_model(tmp_path, source, trained, dtype=dtype)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype, local_files_only=True)
    assert_same_weights(pipeline.unet, trained["unet"].to(dtype))
    assert_same_weights(pipeline.text_encoder, trained["text_encoder"].to(dtype))
    assert_same_weights(pipeline.vae, source.load("vae", dtype=dtype))
    assert pipeline.safety_checker is None
    assert pipeline("a dog", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("wanted", [None, "0", "1"])
def test_no_foreign_bar_stands_between_the_lines(
    tiny_model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wanted: str | None
) -> None:
    """As in a terminal: the bars of downloads are shown, those of files on the disk are not."""
    value = {None: None, "0": False, "1": True}[wanted]
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", value)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    find_model(str(tiny_model)).load("text_encoder")
    assert "Loading" not in capfd.readouterr().err
    assert are_progress_bars_disabled() == (wanted == "1")


def test_saved_model_holds_safetensors_in_the_asked_precision(tiny_model: Path, tmp_path: Path) -> None:
    source = find_model(str(tiny_model))
    unet = source.load("unet")
    save_model(tmp_path, source, {"unet": unet}, dtype=torch.float16)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} <= {".safetensors", ".json", ".txt"}
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert (
        load_file(tmp_path / "text_encoder" / "model.safetensors").keys()
        == published_state("text_encoder", source.load("text_encoder"), torch.float32).keys()
    )


def test_saved_model_can_be_trained_again(tiny_model: Path, tmp_path: Path) -> None:
    source = find_model(str(tiny_model))
    unet = changed(source.load("unet"))
    save_model(tmp_path, source, {"unet": unet}, dtype=torch.float32)
    assert_same_weights(find_model(str(tmp_path)).load("unet"), unet)


def test_names_of_the_text_encoder_are_the_published_ones(tiny_model: Path, tmp_path: Path) -> None:
    source = find_model(str(tiny_model))
    save_model(tmp_path, source, {"text_encoder": source.load("text_encoder")}, dtype=torch.float32)
    names = load_file(tmp_path / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert not any("text_model.text_model" in name for name in names)


def test_source_with_pickles_gives_a_model_without_them(
    model_copy: Path, pickle_weights: Callable[[Path], None], tmp_path: Path
) -> None:
    for component in WITH_WEIGHTS:
        pickle_weights(model_copy / component)
    source = find_model(str(model_copy), allow_pickle=True)
    final = tmp_path / "final"
    save_model(final, source, {"unet": source.load("unet")}, dtype=torch.float32)
    assert not list(final.rglob("*.bin"))
    for name in WITH_WEIGHTS:
        assert_same_weights(find_model(str(final)).load(name), source.load(name))


def test_source_with_a_variant_gives_a_model_without_one(model_copy: Path, tmp_path: Path) -> None:
    for file in model_copy.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    source = find_model(str(model_copy), variant="fp16")
    final = tmp_path / "final"
    save_model(final, source, {"unet": source.load("unet")}, dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(final, local_files_only=True)
    assert_same_weights(pipeline.vae, source.load("vae"))


@pytest.mark.parametrize("component", WITH_WEIGHTS)
def test_pickled_weights_load_where_they_are_allowed(
    tiny_model: Path, model_copy: Path, pickle_weights: Callable[[Path], None], component: str
) -> None:
    pickle_weights(model_copy / component)
    loaded = find_model(str(model_copy), allow_pickle=True).load(component)
    assert_same_weights(loaded, find_model(str(tiny_model)).load(component))


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("component", WITH_WEIGHTS)
def test_pickles_that_run_code_are_refused(
    model_copy: Path, pickle_weights: Callable[[Path], None], tmp_path: Path, component: str
) -> None:
    pickle_weights(model_copy / component)
    (file,) = (model_copy / component).glob("*.bin")
    torch.save({"weight": RunsCode(tmp_path / "was here")}, file)
    with pytest.raises(ModelError, match=rf"{component}: cannot be loaded"):
        find_model(str(model_copy), allow_pickle=True).load(component)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("component", WITH_WEIGHTS)
@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_damaged_weights_are_refused_by_the_name_of_their_component(
    model_copy: Path, component: str, kept: int
) -> None:
    (file,) = (model_copy / component).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=rf"{component}/.*: is truncated .*download the model again") as refused:
        find_model(str(model_copy)).load(component)
    assert "\n" not in str(refused.value)


def test_missing_variant_is_refused(tiny_model: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model\.variant: fp16, but .*unet has no such weights .* Leave model\.variant out"
    ):
        find_model(str(tiny_model), variant="fp16").load("unet")


@pytest.mark.parametrize("missing", [("*",), ("tokenizer.json", "merges.txt"), ("tokenizer.json", "vocab.json")])
def test_tokenizer_without_its_files_is_refused(model_copy: Path, missing: tuple[str, ...]) -> None:
    for pattern in missing:
        for file in (model_copy / "tokenizer").glob(pattern):
            file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer: has neither tokenizer\.json nor vocab\.json and merges\.txt"):
        find_model(str(model_copy)).load("tokenizer")


@pytest.mark.parametrize("content", ["", "{"])
def test_damaged_tokenizer_is_refused(model_copy: Path, content: str) -> None:
    for file in (model_copy / "tokenizer").iterdir():
        file.write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer/(tokenizer|vocab)\.json: is damaged"):
        find_model(str(model_copy)).load("tokenizer")


def test_unknown_autoencoder_is_refused(model_copy: Path) -> None:
    config = model_copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "VQModel"}))
    with pytest.raises(ModelError, match="is a VQModel; allowed: AutoencoderKL, AutoencoderTiny, AutoencoderTAEF2"):
        find_model(str(model_copy)).load("vae")


@pytest.mark.parametrize("component", WITH_WEIGHTS)
def test_half_precision_files_are_loaded_as_asked_frozen_and_evaluating(tmp_path: Path, component: str) -> None:
    model = find_model(str(write_tiny_model(tmp_path / "half", dtype=torch.float16)))
    module = model.load(component)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part.training for part in module.modules())


def test_noise_schedule_is_that_of_the_model_whatever_sampler_it_names(model_copy: Path) -> None:
    wanted = DDPMScheduler.from_pretrained(model_copy / "scheduler")
    EulerDiscreteScheduler.from_config(wanted.config).save_pretrained(model_copy / "scheduler")
    found = load_noise_schedule(find_model(str(model_copy)))
    assert torch.equal(found.alphas_cumprod, wanted.alphas_cumprod)
    assert found.config["prediction_type"] == wanted.config["prediction_type"]


def test_latents_are_never_clipped(model_copy: Path) -> None:
    (model_copy / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EulerDiscreteScheduler"}')
    assert load_noise_schedule(find_model(str(model_copy))).config["clip_sample"] is False


@pytest.mark.parametrize(
    ("name", "unet_parameters", "text_encoder_parameters", "num_layers"),
    [("sd15", 859_520_964, 123_060_480, 12), ("sd21", 865_910_724, 340_387_840, 23)],
)
def test_published_models_have_their_published_sizes_and_names(
    name: str, unet_parameters: int, text_encoder_parameters: int, num_layers: int
) -> None:
    configs = {
        part: json.loads((CONFIGS / name / part / "config.json").read_text()) for part in ("unet", "text_encoder")
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    assert sum(parameter.numel() for parameter in unet.parameters()) == unet_parameters
    assert sum(parameter.numel() for parameter in text_encoder.parameters()) == text_encoder_parameters
    assert len(unet.state_dict()) == 686
    assert "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v.weight" in unet.state_dict()
    names = {
        name if name.startswith("text_model.") else f"text_model.{name}" for name, _ in text_encoder.named_parameters()
    }
    layers = {
        f"text_model.encoder.layers.{layer}.{part}.{kind}"
        for layer in range(num_layers)
        for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
            "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
        )
        for kind in ("weight", "bias")
    }  # fmt: skip
    others = {
        "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
        "text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias",
    }  # fmt: skip
    assert names == layers | others


def test_sdxl_has_its_published_sizes_and_names() -> None:
    folder = Path(models.__file__).parent / "configs" / "sdxl_base"
    model = ModelFolder(name="sdxl", path=folder, family=find_family(ModelFiles(path=folder)))
    assert model.family.name == "Stable Diffusion XL"
    meta = torch.device("meta")
    built = {
        "unet": model.load("unet", device=meta),
        "text_encoder": model.load("text_encoder", device=meta),
        "text_encoder_2": model.load("text_encoder_2", device=meta),
    }
    counts = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in built.items()}
    assert counts == {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
    names = {name: module.state_dict().keys() for name, module in built.items()}  # the tiny model shows they are saved
    assert {name: len(found) for name, found in names.items()} == {
        "unet": 1680, "text_encoder": 196, "text_encoder_2": 517,
    }  # fmt: skip
    assert "mid_block.attentions.0.transformer_blocks.9.attn2.to_v.weight" in names["unet"]
    assert {"add_embedding.linear_1.weight", "add_embedding.linear_2.bias"} <= names["unet"]
    assert "text_model.encoder.layers.31.mlp.fc2.bias" in names["text_encoder_2"]
    assert names["text_encoder_2"] - {"text_projection.weight"} == {
        name for name in names["text_encoder_2"] if name.startswith("text_model.")
    }


def test_out_of_memory_is_not_a_damaged_model(tiny_model: Path) -> None:
    with Fault(20, ERRORS[1]), pytest.raises(RuntimeError, match="can't allocate memory"):
        find_model(str(tiny_model)).load("unet")


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_read_one_by_one_are_those_of_from_pretrained(
    tiny_model: Path, component: str, dtype: torch.dtype
) -> None:
    kind = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}[component]
    option = "dtype" if component == "text_encoder" else "torch_dtype"
    expected = cast("Any", kind).from_pretrained(tiny_model / component, **{option: dtype})
    found = find_model(str(tiny_model)).load(component, dtype=dtype)
    for tensors, wanted in ((found.state_dict(), expected.state_dict()), (buffers(found), buffers(expected))):
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
        assert all(tensors[name].dtype == wanted[name].dtype for name in wanted)
    assert type(found) is type(expected)
    own, theirs = (
        module.config.to_dict() if component == "text_encoder" else dict(module.config) for module in (found, expected)
    )
    assert own.keys() | {"_name_or_path"} == theirs.keys() | {"_name_or_path"}
    assert all(own[name] == theirs[name] for name in own.keys() - {"_name_or_path"})


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers())


@pytest.mark.parametrize("kind", ["bf16_extra_bits", "bf16_stochastic", "fp32"])
def test_weights_converted_as_they_are_read_are_those_converted_afterwards(tiny_model: Path, kind: Weights) -> None:
    model, bits = find_model(str(tiny_model)), dict[str, torch.Tensor]()
    expected = {"unet": model.load("unet")}
    expected_bits = weights.apply(expected, kind)
    with nullcontext() if (convert := weights.converter(kind, bits)) is None else converted(convert):
        found = {"unet": model.load("unet")}
    bits |= weights.apply(found, kind)
    assert bits.keys() == expected_bits.keys()
    assert all(torch.equal(bits[name], expected_bits[name]) for name in bits)
    state, wanted = found["unet"].state_dict(), expected["unet"].state_dict()
    assert all(torch.equal(state[name], wanted[name]) and state[name].dtype == wanted[name].dtype for name in wanted)


def test_parameters_own_their_memory(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    unet = find_model(str(model)).load("unet")
    before = unet.conv_in.weight.clone()
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert torch.equal(unet.conv_in.weight, before)
