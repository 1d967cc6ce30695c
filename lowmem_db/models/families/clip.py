"""CLIP's tokenizers and text encoders (arXiv:2103.00020), as Stable Diffusion uses them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lowmem_db.models.new_words import expanded


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Int[Tensor, "b tokens"]:
    """Return token ids, padded or truncated to the length the model was trained with."""
    encoded = tokenizer(
        [expanded(tokenizer, prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return encoded.input_ids


def encode_prompt(text_encoder: CLIPTextModel, input_ids: Int[Tensor, "b tokens"]) -> Float[Tensor, "b tokens dim"]:
    """Return the last hidden state after the final layer norm, computed without an attention mask."""
    return text_encoder(input_ids.to(text_encoder.device))[0]


def encode_prompt_with_two(
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    input_ids: Int[Tensor, "b tokens"],
    input_ids_2: Int[Tensor, "b tokens"],
) -> tuple[Float[Tensor, "b tokens dim"], Float[Tensor, "b width"]]:
    """Return SDXL's embeddings of prompts (arXiv:2307.01952, section 2.1).

    Returns:
        The penultimate hidden states of both text encoders, concatenated along channels, and the pooled, projected
        embedding of the second.
    """
    first = text_encoder(input_ids.to(text_encoder.device), output_hidden_states=True)
    second = text_encoder_2(input_ids_2.to(text_encoder_2.device), output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds
