"""Tiny models with random weights in the layout of Stable Diffusion, for tests."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from lowmem_db.models.saving import save_component

RESOLUTION = 32
IF_RESOLUTION = 16
NUM_TOKENS = 16
T5_TOKENIZER = Path(__file__).parent / "assets" / "t5_tokenizer"


def write_tiny_model(folder: Path, *, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32) -> Path:
    """Write a Stable Diffusion model of about 0.1 M parameters: 32 px pictures, 16 px latents of 4 channels."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_component(folder / "unet", tiny_unet(), dtype=dtype)
    save_component(folder / "text_encoder", tiny_text_encoder(), dtype=dtype)
    save_component(folder / "vae", tiny_autoencoder(), dtype=dtype)
    write_byte_tokenizer(folder / "tokenizer")
    DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def tiny_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=NUM_TOKENS,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return CLIPTextModel(config)


def tiny_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
        force_upcast=False,
    )


def write_byte_tokenizer(folder: Path, *, pad_token: str = "<|endoftext|>") -> None:
    """Write CLIP's tokenizer without a single merge: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    with TemporaryDirectory() as made:  # transformers 4 takes files alone
        files = Path(made, "vocab.json"), Path(made, "merges.txt")
        files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
        files[1].write_text("#version: 0.2\n", encoding="utf-8")
        tokenizer = CLIPTokenizer(*map(str, files), model_max_length=NUM_TOKENS, pad_token=pad_token)
        tokenizer.save_pretrained(folder)


def write_tiny_sdxl(folder: Path, *, force_zeros: bool = True) -> Path:
    """Write a model in the layout of Stable Diffusion XL; its pictures and latents are those of the tiny model."""
    write_tiny_model(folder)
    torch.manual_seed(1)
    shutil.rmtree(folder / "unet")
    save_component(folder / "unet", tiny_sdxl_unet(), dtype=torch.float32)
    save_component(folder / "text_encoder_2", tiny_text_encoder_2(), dtype=torch.float32)
    write_byte_tokenizer(folder / "tokenizer_2", pad_token="!")
    vae = folder / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"force_upcast": True}))
    scheduler = EulerDiscreteScheduler.from_config(DDPMScheduler.load_config(folder / "scheduler"))
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "force_zeros_for_empty_prompt": force_zeros,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def tiny_text_encoder_2() -> CLIPTextModelWithProjection:
    config = tiny_text_encoder().config
    config.projection_dim = 16
    config.architectures = ["CLIPTextModelWithProjection"]
    return CLIPTextModelWithProjection(config)


def write_tiny_if(folder: Path) -> Path:
    """Write a model in the layout of DeepFloyd IF's first stage: 16 px pictures, and T5's real tokens."""
    torch.manual_seed(2)
    save_component(folder / "unet", tiny_if_unet(), dtype=torch.float32)
    save_component(folder / "text_encoder", tiny_t5(), dtype=torch.float32)
    if_scheduler(sample_max_value=1.5).save_pretrained(folder / "scheduler")
    write_t5_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "IFPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "watermarker": ["deepfloyd_if", "IFWatermarker"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_tiny_if_super_resolution(folder: Path) -> Path:
    """Write a model in the layout of DeepFloyd IF's second stage: pictures of 16 px become pictures of 32 px."""
    write_tiny_if(folder)
    shutil.rmtree(folder / "unet")
    torch.manual_seed(3)
    unet = tiny_if_unet(
        sample_size=2 * IF_RESOLUTION, in_channels=6, class_embed_type="timestep", time_embedding_act_fn="gelu",
        only_cross_attention=True, resnet_skip_time_act=True, mid_block_scale_factor=1.414,
        resnet_out_scale_factor=1.414,
    )  # fmt: skip
    save_component(folder / "unet", unet, dtype=torch.float32)
    if_scheduler(sample_max_value=1.0).save_pretrained(folder / "scheduler")
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noising.save_pretrained(folder / "image_noising_scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "IFSuperResolutionPipeline", "image_noising_scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_if_unet(*, width: int = 24, **changes: Any) -> UNet2DConditionModel:
    """Return a UNet of IF's blocks, which differs from real ones in sizes alone, for text embeddings of some width."""
    fields = {
        "sample_size": IF_RESOLUTION,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (8, 32),
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,  # a multiple of the groups of its norm
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": width,
        "encoder_hid_dim_type": "text_proj",
        "norm_num_groups": 4,
        "resnet_time_scale_shift": "scale_shift",
    }
    return UNet2DConditionModel(**(fields | changes))


def tiny_t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=32128,
        d_model=24,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    encoder = T5EncoderModel(config).eval()
    with torch.no_grad():  # T5 begins with position biases that are all alike
        encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    return encoder


def if_scheduler(sample_max_value: float) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=sample_max_value,
    )


def write_t5_tokenizer(folder: Path) -> None:
    folder.mkdir()
    shutil.copyfile(T5_TOKENIZER / "tokenizer.json", folder / "tokenizer.json")
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **special}))
