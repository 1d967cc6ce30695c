"""Stable Diffusion XL (arXiv:2307.01952): two text encoders, and a UNet conditioned on sizes and crop of a picture."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lowmem_db.models.families import clip
from lowmem_db.models.families.base import Component, Tensors
from lowmem_db.models.families.original_layout import SDXL
from lowmem_db.models.families.stable_diffusion import StableDiffusion, without_extras
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.loading import load_module, load_tokenizer
from lowmem_db.records import Conditioning


class StableDiffusionXL(StableDiffusion):
    """Models with a second text encoder; arguments as for :class:`StableDiffusion`."""

    components = (
        *StableDiffusion.components,
        Component("text_encoder_2", "text_encoder", partial(load_module, CLIPTextModelWithProjection)),
        Component("tokenizer_2", "tokenizer", lambda files, name, *_: load_tokenizer(files, name)),
    )
    pipelines = ("StableDiffusionXLPipeline",)
    lora_prefixes: Mapping[str, str] = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1",
        "text_encoder_2": "lora_te2",
    }

    def tokenize(self, files: ModelFiles, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the token ids of prompts by both tokenizers, each with its own padding."""
        second = clip.tokenize(load_tokenizer(files, "tokenizer_2"), prompts, self.reading.num_chunks)
        return super().tokenize(files, prompts) | {"input_ids_2": second}

    def encode(self, text_encoders: Mapping[str, nn.Module], tokens: Tensors) -> dict[str, Tensor]:
        """Return hidden states of both text encoders, and the pooled embedding of the second."""
        embeds, pooled = clip.encode_prompt_with_two(
            cast("CLIPTextModel", text_encoders["text_encoder"]),
            cast("CLIPTextModelWithProjection", text_encoders["text_encoder_2"]),
            tokens["input_ids"],
            tokens["input_ids_2"],
            layer=self.reading.clip_skip or self.usual_clip_skip,
            num_chunks=self.reading.num_chunks,
        )
        return {"embeds": embeds, "pooled": pooled}

    def zeroes_empty_prompt(self, files: ModelFiles) -> bool:
        """Return whether the empty prompt is embedded as zeros, as when SDXL was trained."""
        return files.index.get("force_zeros_for_empty_prompt", True)

    def describe_pictures(self, facts: Float[Tensor, "b 6"]) -> dict[str, Tensor]:
        """Return all six numbers (section 2.2)."""
        return {"time_ids": facts}

    def blank_tokens(self, files: ModelFiles, count: int) -> dict[str, Tensor]:
        """Return dummy token ids for both text encoders."""
        tokens = super().blank_tokens(files, count)
        return tokens | {"input_ids_2": tokens["input_ids"]}

    def blank_embeds(
        self, files: ModelFiles, count: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return embeddings of zeros."""
        width = files.config_of("text_encoder_2")["projection_dim"]
        pooled = torch.zeros(count, width, dtype=dtype, device=device)
        return super().blank_embeds(files, count, device, dtype) | {"pooled": pooled}

    def added_conditioning(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """Return the pooled embedding, and the sizes and crop."""
        return {"text_embeds": conditioning.embeds["pooled"], "time_ids": conditioning.picture["time_ids"]}

    def finished_index(self, index: dict[str, Any]) -> dict[str, Any]:
        """Drop optional parts that are not in the folder; the pipeline has no safety checker."""
        return without_extras(index)


SD_XL = StableDiffusionXL(
    "Stable Diffusion XL",
    2048,
    layout=SDXL,
    hub_ids={"stabilityai/stable-diffusion-xl-base-1.0": "sdxl_base"},
    kohya_version="sdxl_base_v1-0",
    usual_clip_skip=2,
)
SD_XL_OF_ANY_WIDTH = StableDiffusionXL("Stable Diffusion XL architecture", usual_clip_skip=2)
