"""All tokenizers and text encoders of a model, whatever its family: one, or the two of SDXL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lowmem_db.models.conditioning import embed, tokenize
from lowmem_db.models.loading import CPU, load_text_encoder, load_text_encoder_2, load_tokenizer
from lowmem_db.models.source import ModelFolder
from lowmem_db.records import Conditioning


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a model in memory; the second is None where it has one."""

    first: CLIPTextModel
    second: CLIPTextModelWithProjection | None

    def modules(self) -> Mapping[str, nn.Module]:
        """Return them by the name of their component."""
        modules = {"text_encoder": self.first, "text_encoder_2": self.second}
        return {name: module for name, module in modules.items() if module is not None}

    @torch.no_grad()
    def embed(self, conditioning: Conditioning) -> Conditioning:
        """Return conditioning with the embeddings of its token ids, without gradients."""
        return embed(self.first, self.second, conditioning)


def load_text_encoders(
    model: ModelFolder, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> TextEncoders:
    """Load the text encoders in evaluation mode, frozen."""
    has_second = model.family.has_text_encoder_2
    return TextEncoders(
        load_text_encoder(model, device=device, dtype=dtype),
        load_text_encoder_2(model, device=device, dtype=dtype) if has_second else None,
    )


def tokenize_prompts(model: ModelFolder, prompts: Sequence[str]) -> Conditioning:
    """Return the token ids of prompts by every tokenizer of a model, each with its own padding."""
    has_second = model.family.has_text_encoder_2
    return Conditioning(
        input_ids=tokenize(load_tokenizer(model), prompts),
        input_ids_2=tokenize(load_tokenizer(model, "tokenizer_2"), prompts) if has_second else None,
    )
