"""CLIP's tokenizers and text encoders (arXiv:2103.00020), as Stable Diffusion uses them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lowmem_db.models.new_words import expanded


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], num_chunks: int = 1) -> Int[Tensor, "b tokens"]:
    """Return token ids, padded or truncated to the length the model was trained with, or to several such chunks.

    Each chunk has a start and an end token of its own, as other programs do it; one without words is the empty prompt.
    """
    prompts = [expanded(tokenizer, prompt) for prompt in prompts]
    if num_chunks > 1:
        return torch.tensor([_in_chunks(tokenizer, prompt, num_chunks) for prompt in prompts])
    encoded = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return encoded.input_ids


def _in_chunks(tokenizer: CLIPTokenizer, prompt: str, num_chunks: int) -> list[int]:
    length = tokenizer.model_max_length
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    words = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    found: list[int] = []
    for first in range(0, num_chunks * (length - 2), length - 2):
        chunk = [start, *words[first : first + length - 2], end]
        found += [*chunk, *[padding] * (length - len(chunk))]
    return found


def encode_prompt(
    text_encoder: CLIPTextModel, input_ids: Int[Tensor, "b tokens"], *, layer: int = 1, num_chunks: int = 1
) -> Float[Tensor, "b tokens dim"]:
    """Return a hidden state after the final layer norm, computed without an attention mask.

    Args:
        text_encoder: The text encoder.
        input_ids: Token ids of all chunks, one after the other.
        layer: The layer to read, counted from the end.
        num_chunks: Chunks of each prompt, which are encoded by themselves.
    """
    chunks = _chunks(input_ids.to(text_encoder.device), num_chunks)
    if layer == 1:
        found = text_encoder(chunks)[0]
    else:
        inner: Any = getattr(text_encoder, "text_model", text_encoder)  # one level deeper in transformers 4
        found = inner.final_layer_norm(text_encoder(chunks, output_hidden_states=True).hidden_states[-layer])
    return _joined(found, num_chunks)


def _chunks(input_ids: Int[Tensor, "b tokens"], num_chunks: int) -> Int[Tensor, "chunks length"]:
    return input_ids.reshape(len(input_ids) * num_chunks, -1)


def _joined(embeds: Float[Tensor, "chunks length dim"], num_chunks: int) -> Float[Tensor, "b tokens dim"]:
    return embeds.reshape(len(embeds) // num_chunks, -1, embeds.shape[-1])


def encode_prompt_with_two(
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    input_ids: Int[Tensor, "b tokens"],
    input_ids_2: Int[Tensor, "b tokens"],
    *,
    layer: int = 2,
    num_chunks: int = 1,
) -> tuple[Float[Tensor, "b tokens dim"], Float[Tensor, "b width"]]:
    """Return SDXL's embeddings of prompts (arXiv:2307.01952, section 2.1).

    Returns:
        Hidden states of both text encoders (by default those of the last layer but one), concatenated along channels,
        and the pooled, projected embedding of the second, of the first chunk.
    """
    first = text_encoder(_chunks(input_ids.to(text_encoder.device), num_chunks), output_hidden_states=True)
    second = text_encoder_2(_chunks(input_ids_2.to(text_encoder_2.device), num_chunks), output_hidden_states=True)
    embeds = torch.cat([first.hidden_states[-layer], second.hidden_states[-layer]], dim=-1)
    return _joined(embeds, num_chunks), second.text_embeds[::num_chunks]
