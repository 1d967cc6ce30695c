"""Tiny models with random weights in the layouts of Stable Diffusion 1.5, 2.1 and XL, in diffusers' folders.

Text encoders know CLIP's whole vocabulary and read 77 tokens, for a single file has no place for another tokenizer.
"""

import json
import math
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowmem_db.models.families import find_family
from lowmem_db.models.families.original_layout import SD1, SD2, SDXL, Entry
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.saving import save_component
from lowmem_db.models.single_file import CONFIGS_DIR
from lowmem_db.models.stored_weights import expected_shapes

RESOLUTION = 32
LAYOUTS = {"sd15": SD1, "sd21": SD2, "sd21_base": SD2, "sdxl_base": SDXL}
BUNDLED = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl_base"}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 16},
    "sd2": {"cross_attention_dim": 24, "use_linear_projection": True, "upcast_attention": True},
    "sdxl": {
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}


def write_original_model(folder: Path, family: str, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny model of ``sd1``, ``sd2`` or ``sdxl``; every tensor is random, biases too."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    bundled = CONFIGS_DIR / BUNDLED[family]
    for name, module in _components(family).items():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                nn.init.normal_(tensor, std=0.1)
        save_component(folder / name, module, dtype=dtype)
    shutil.copytree(bundled / "scheduler", folder / "scheduler")
    for tokenizer in bundled.glob("tokenizer*"):
        shutil.copytree(tokenizer, folder / tokenizer.name)
        shutil.copytree(CONFIGS_DIR / "clip_tokenizer", folder / tokenizer.name, dirs_exist_ok=True)
    shutil.copyfile(bundled / "model_index.json", folder / "model_index.json")
    return folder


def scheduler_fields(folder: Path, **fields: object) -> None:
    """Change the scheduler of a model."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _components(family: str) -> dict[str, nn.Module]:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **_UNETS[family],
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
    )
    if family == "sd2":
        return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(_text(24, 23, "gelu"))}
    found = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(_text(16, 2, "quick_gelu"))}
    if family == "sdxl":
        found["text_encoder_2"] = CLIPTextModelWithProjection(_text(24, 2, "gelu"))
    return found


def _text(width: int, num_layers: int, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        hidden_act=hidden_act,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=2,
    )


def published(name: str) -> ModelFolder:
    """Return one of the bundled configurations."""
    return ModelFolder(name=name, path=CONFIGS_DIR / name, family=find_family(ModelFiles(path=CONFIGS_DIR / name)))


@lru_cache
def entries_and_shapes(name: str, component: str) -> tuple[list[Entry], dict[str, tuple[int, ...]]]:
    shapes = expected_shapes(published(name), component)
    return LAYOUTS[name].entries(component, published(name).config_of(component), shapes), shapes


def shapes_in_file(name: str, component: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a component's tensors in the published single file."""
    entries, shapes = entries_and_shapes(name, component)
    constant = {"positions": (1, 77), "logit_scale": (), "identity": (1024, 1024)}
    return {
        entry.name: entry.shape([shapes[source] for source in entry.sources]) if entry.sources else constant[entry.form]
        for entry in entries
    }


def write_sparse(file: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file of half-precision tensors that takes no room: a header, and zeros nobody wrote."""
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + stop)
    return file
