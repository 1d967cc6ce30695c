"""What a single file holds is told by its header: full-size files without weights, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowmem_db.errors import ModelError
from lowmem_db.models.single_file import CONFIGS_KEY, recognise
from tests.original_models import LAYOUTS, shapes_in_file, write_sparse

Shapes = dict[str, tuple[int, ...]]
FAMILIES = {
    "sd15": "Stable Diffusion 1.x",
    "sd21": "Stable Diffusion 2.x",
    "sdxl_base": "Stable Diffusion XL",
}
UNET = "model.diffusion_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"


def whole(name: str) -> Shapes:
    return {key: shape for part in LAYOUTS[name].prefixes for key, shape in shapes_in_file(name, part).items()}


@pytest.fixture(scope="module")
def sd15() -> Shapes:
    return whole("sd15")


@pytest.fixture(scope="module")
def sd21() -> Shapes:
    return whole("sd21")


def refusal(file: Path) -> str:
    with pytest.raises(ModelError) as error:
        recognise(file)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_published_models_are_recognised_by_their_shapes(name: str, tmp_path: Path) -> None:
    spec = {"modelspec.prediction_type": "v" if name == "sd21" else "epsilon"}
    model = recognise(write_sparse(tmp_path / "model.safetensors", whole(name), spec))
    assert (model.family.name, model.path.name) == (FAMILIES[name], name)
    assert f"model.safetensors is {FAMILIES[name]} and predicts" in model.remark


def test_what_other_programs_leave_in_a_file_does_no_harm(sd15: Shapes, tmp_path: Path) -> None:
    more = {"alphas_cumprod": (1000,), "betas": (1000,), "model_ema.decay": (), "model_ema.num_updates": ()}
    assert recognise(write_sparse(tmp_path / "m.safetensors", sd15 | more)).path.name == "sd15"


@pytest.mark.parametrize("spare", ["position_ids", "logit_scale", "resblocks.23.", "text_projection"])
def test_what_nobody_reads_may_be_missing(spare: str, sd15: Shapes, sd21: Shapes, tmp_path: Path) -> None:
    for shapes in (sd15, sd21):
        few = {name: shape for name, shape in shapes.items() if spare not in name}
        recognise(write_sparse(tmp_path / "m.safetensors", few))


def test_moving_average_alone_is_the_unet(sd15: Shapes, tmp_path: Path) -> None:
    averaged = {}
    for name, shape in sd15.items():
        flat = "model_ema." + name.removeprefix("model.").replace(".", "")
        averaged[flat if name.startswith(UNET) else name] = shape
    model = recognise(write_sparse(tmp_path / "ema.safetensors", averaged))
    assert model.tensors[CONV_IN].name == "model_ema.diffusion_modelinput_blocks00weight"
    both = recognise(write_sparse(tmp_path / "both.safetensors", averaged | sd15))
    assert both.tensors[CONV_IN].name == CONV_IN


def test_clip_may_be_named_as_old_versions_of_transformers_did(sd15: Shapes, tmp_path: Path) -> None:
    old = {name.replace("transformer.text_model.", "transformer."): shape for name, shape in sd15.items()}
    assert recognise(write_sparse(tmp_path / "old.safetensors", old)).path.name == "sd15"


# What the UNet predicts; all else about it is in test_prediction.py.


def test_prediction_and_zero_terminal_snr_are_in_the_scheduler(sd15: Shapes, tmp_path: Path) -> None:
    model = recognise(write_sparse(tmp_path / "m.safetensors", sd15 | {"v_pred": (0,), "ztsnr": (0,)}))
    scheduler = model.config_of("scheduler")
    assert scheduler["prediction_type"] == "v_prediction"
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")
    assert model.remark.endswith("as its tensor v_pred says; it has zero terminal SNR")


# What is refused.


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "is a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "is a LoRA"),
        (["first_stage_model.encoder.conv_in.weight"], "is only an autoencoder"),
        (["decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"], "is only an autoencoder"),
        (["control_model.input_blocks.0.0.weight"], "is a ControlNet"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "is only a UNet, in diffusers' layout"),
        (["cond_stage_model.transformer.text_model.final_layer_norm.weight"], "is only a text encoder"),
        (["model.diffusion_model.double_blocks.0.img_attn.proj.weight"], "is a Flux model"),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], "is a Stable Diffusion 3 model"),
        (["emb_params"], "is a Textual Inversion embedding"),
        (["a", "b", "c", "d"], "is not a known model: it has 4 tensors, such as a, b, c"),
        ([], "is not a known model: it has 0 tensors, such as none"),
    ],
)
def test_other_files_are_refused_with_what_they_are(tensors: list[str], found: str, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2) for name in tensors}, file)
    message = refusal(file)
    assert message.startswith(f"model.base: {file} {found}")
    assert "allowed: a complete Stable Diffusion 1.x, 2.x or XL model" in message


@pytest.mark.parametrize(("channels", "kind"), [(9, "an inpainting model"), (8, "an image-editing model")])
def test_unet_for_other_channels_is_refused(channels: int, kind: str, sd15: Shapes, tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "m.safetensors", sd15 | {CONV_IN: (320, channels, 3, 3)})
    assert f"is {kind}: its UNet has {channels} input channels instead of 4" in refusal(file)


@pytest.mark.parametrize(
    ("prefix", "name"), [("first_stage_model.", "autoencoder"), ("cond_stage_model.", "text encoder")]
)
def test_missing_component_is_named(prefix: str, name: str, sd15: Shapes, tmp_path: Path) -> None:
    few = {key: shape for key, shape in sd15.items() if not key.startswith(prefix)}
    assert f"has a UNet, but no {name}" in refusal(write_sparse(tmp_path / "m.safetensors", few))


def test_missing_tensors_are_counted(sd15: Shapes, tmp_path: Path) -> None:
    few = {key: shape for key, shape in sd15.items() if "middle_block.1" not in key}
    message = refusal(write_sparse(tmp_path / "m.safetensors", few))
    assert re.search(r"lacks 26 tensors of its UNet, such as model\.diffusion_model\.middle_block\.1\.", message)


def test_other_shapes_are_refused(sd15: Shapes, tmp_path: Path) -> None:
    name = f"{UNET}middle_block.0.in_layers.2.weight"
    message = refusal(write_sparse(tmp_path / "m.safetensors", sd15 | {name: (640, 1280, 3, 3)}))
    assert f"is not a Stable Diffusion 1.x model: {name} is [640, 1280, 3, 3], not [1280, 1280, 3, 3]" in message


def test_refiner_is_refused(sd15: Shapes, tmp_path: Path) -> None:
    wide = {name: (*shape[:1], 1280) if "attn2.to_k" in name else shape for name, shape in sd15.items()}
    message = refusal(write_sparse(tmp_path / "m.safetensors", wide))
    assert "has a UNet for text embeddings of width 1280 (SDXL's refiner)" in message


@pytest.mark.parametrize(
    ("marker", "what"), [("edm_mean", "Playground v2.5"), ("edm_std", "Playground"), ("edm_vpred.sigma_max", "CosXL")]
)
def test_models_of_other_noise_are_refused_by_their_markers(
    marker: str, what: str, sd15: Shapes, tmp_path: Path
) -> None:
    message = refusal(write_sparse(tmp_path / "m.safetensors", sd15 | {marker: (1, 4, 1, 1)}))
    assert what in message
    assert f"as its tensor {marker} says" in message


def test_tensors_of_the_unet_that_the_layout_does_not_know_are_refused(sd15: Shapes, tmp_path: Path) -> None:
    name = "time_embed.cond_proj.weight"
    message = refusal(write_sparse(tmp_path / "m.safetensors", sd15 | {UNET + name: (4,)}))
    assert f"is not a plain Stable Diffusion 1.x model: its UNet has 1 tensors more, such as {UNET}{name}" in message


@pytest.mark.parametrize(
    "name",
    [
        "scaled_fp8",
        f"{UNET}scaled_fp8",
        f"{UNET}middle_block.1.proj_in.scale_weight",
        f"{UNET}middle_block.1.proj_in.weight_scale",
        f"{UNET}middle_block.1.proj_in.comfy_quant",
        f"{UNET}middle_block.1.proj_in.weight.quant_state.bitsandbytes__nf4",
    ],
)
def test_weights_with_scales_beside_them_are_refused(name: str, sd15: Shapes, tmp_path: Path) -> None:
    message = refusal(write_sparse(tmp_path / "m.safetensors", sd15 | {name: (1,)}))
    assert f"holds quantized weights with scales beside them ({name})" in message
    assert "use the fp16 or bf16 version" in message


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert "is quantized (GGUF), which is for drawing only" in refusal(file)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_pickled_file_is_refused_unread(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"m{suffix}"
    file.write_bytes(b"\x80\x04cos\nsystem\n")
    assert "is pickled, which can run code when it is read; allowed: the same model as .safetensors" in refusal(file)


def test_truncated_file_is_refused(sd15: Shapes, tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "m.safetensors", sd15)
    with file.open("r+b") as stream:
        stream.truncate(1 << 20)
    assert "m.safetensors: is truncated or not a safetensors file" in refusal(file)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"text_encoder": {}}', '{"text_encoder": [], "scheduler": 3}']
)
def test_damaged_configurations_in_the_metadata_are_refused(content: str, sd15: Shapes, tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "m.safetensors", sd15, {CONFIGS_KEY: content})
    assert f"its metadata {CONFIGS_KEY} is damaged" in refusal(file)


@pytest.mark.parametrize(
    ("component", "changed"),
    [
        ("unet", []),
        ("unet", {}),
        ("vae", "x"),
        ("text_encoder", None),
        ("scheduler", 3),
        ("unet", {"block_out_channels": 5}),
        ("vae", {"latent_channels": "four"}),
        ("text_encoder", {"num_hidden_layers": [12]}),
        ("unet", {"block_out_channels": [-1]}),
        ("unet", {"cross_attention_dim": "x"}),
        ("unet", {"attention_head_dim": 0}),
        ("text_encoder", {"hidden_size": "big"}),
        ("text_encoder", {"num_attention_heads": 7}),
        ("text_encoder", {"hidden_act": "nope"}),
        ("vae", {"block_out_channels": None}),
        ("scheduler", {"prediction_type": "nope"}),
        ("scheduler", {"prediction_type": ["epsilon"]}),
        ("scheduler", {"beta_schedule": "nope"}),
    ],
)
def test_nonsense_in_the_metadata_is_refused(component: str, changed: object, sd15: Shapes, tmp_path: Path) -> None:
    plain = recognise(write_sparse(tmp_path / "m.safetensors", sd15))
    configs: dict[str, object] = {name: plain.config_of(name) for name in ("unet", "vae", "text_encoder", "scheduler")}
    configs[component] = plain.config_of(component) | changed if isinstance(changed, dict) and changed else changed
    file = write_sparse(tmp_path / "m.safetensors", sd15, {CONFIGS_KEY: json.dumps(configs)})
    assert f"its metadata {CONFIGS_KEY} is damaged" in refusal(file)


def test_configurations_in_the_metadata_come_first(sd15: Shapes, tmp_path: Path) -> None:
    folder = recognise(write_sparse(tmp_path / "m.safetensors", sd15))
    configs = {name: folder.config_of(name) for name in ("unet", "vae", "text_encoder", "scheduler")}
    configs["unet"] = configs["unet"] | {"sample_size": 72}
    model = recognise(write_sparse(tmp_path / "m.safetensors", sd15, {CONFIGS_KEY: json.dumps(configs)}))
    assert model.config_of("unet")["sample_size"] == 72
    assert model.remark.endswith("predicts epsilon, as its metadata lowmem_db.components says")
