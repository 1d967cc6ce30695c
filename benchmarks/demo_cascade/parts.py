"""The parts of the small cascade: T5's most frequent pieces, a T5 encoder of its own, and two UNets of IF's blocks."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from lowmem_db.models.saving import save_component

WIDTH, ENTRIES = 48, 10_112  # ranks 5000 to 10000, where the paper takes identifiers from, are among these entries
SIZES = {1: 16, 2: 64}
CHANNELS = {1: (32, 48, 80), 2: (32, 48, 64)}
_CROSS_ATTENTION = 64
_GROUPS = {1: 4, 2: 1}
"""Of channels, in norms. The fewer, the less of a picture's mean colour and contrast a norm takes away."""
_PIPELINES = {1: "IFPipeline", 2: "IFSuperResolutionPipeline"}


def write_tokenizer(source: Path, folder: Path, entries: int = ENTRIES) -> None:
    """Writes T5's tokenizer with its most frequent pieces only.

    Args:
        source: T5's `tokenizer.json`.
        folder: the folder to write.
        entries: how many pieces stay.
    """
    content = json.loads(source.read_text(encoding="utf-8"))
    content["model"]["vocab"] = content["model"]["vocab"][:entries]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < entries]
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **special}))


def build_text_encoder(entries: int = ENTRIES) -> T5EncoderModel:
    """Returns a T5 encoder of two layers, which trains with the first stage and is frozen afterwards."""
    config = T5Config(
        vocab_size=entries, d_model=WIDTH, d_kv=WIDTH // 4, d_ff=2 * WIDTH, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return T5EncoderModel(config)


def build_unet(stage: int, channels: tuple[int, ...] | None = None) -> UNet2DConditionModel:
    """Returns the UNet of a stage: attention at every level but the first, as IF has it.

    Args:
        stage: 1 draws 16 px from a prompt, 2 enlarges them to 64 px.
        channels: channels of its levels.
    """
    channels = channels or CHANNELS[stage]
    attended = len(channels) - 1
    fields: dict[str, Any] = {
        "sample_size": SIZES[stage],
        "in_channels": 3 * stage,
        "out_channels": 6,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * attended,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * attended + ("ResnetUpsampleBlock2D",),
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "attention_head_dim": 16,
        "cross_attention_dim": _CROSS_ATTENTION,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": WIDTH,
        "encoder_hid_dim_type": "text_proj",
        "norm_num_groups": _GROUPS[stage],
        "resnet_time_scale_shift": "scale_shift",
    }
    if stage == 2:
        fields |= {"class_embed_type": "timestep", "time_embedding_act_fn": "gelu", "only_cross_attention": True}
    return UNet2DConditionModel(**fields)


def build_scheduler(stage: int) -> DDPMScheduler:
    """Returns IF's noise process and thresholding; the variance is fixed, because the recipe trains none.

    The models predict v (arXiv:2202.00512, Eq. 10) where IF's predict the noise: at the last timesteps a copy of the
    input is nearly the noise, and what trains in minutes leaves the colours of a picture to it.
    """
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", variance_type="fixed_small",
        thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value={1: 1.5, 2: 1.0}[stage],
    )  # fmt: skip


def write_stage(folder: Path, stage: int, unet: nn.Module, text_encoder: nn.Module, tokenizer: Path) -> None:
    """Writes a stage in diffusers' layout, in half precision."""
    save_component(folder / "unet", unet, dtype=torch.float16)
    save_component(folder / "text_encoder", text_encoder, dtype=torch.float16)
    shutil.copytree(tokenizer, folder / "tokenizer")
    build_scheduler(stage).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": _PIPELINES[stage],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        **dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"), (None, None)),
    }
    if stage == 2:
        DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "image_noising_scheduler")
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
