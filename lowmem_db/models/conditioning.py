"""From prompts to what the denoiser is told."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lowmem_db.records import Conditioning


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Int[Tensor, "b tokens"]:
    """Return token ids, padded or cut to the length the model was trained with."""
    encoded = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    return encoded.input_ids


def num_cut_tokens(tokenizer: CLIPTokenizer, prompt: str) -> int:
    """Return how many tokens of a prompt the model will not see."""
    return max(0, len(tokenizer(prompt, verbose=False).input_ids) - tokenizer.model_max_length)


def encode_prompt(text_encoder: CLIPTextModel, input_ids: Int[Tensor, "b tokens"]) -> Float[Tensor, "b tokens dim"]:
    """Return the last hidden state after the final layer norm, without attention mask, as Stable Diffusion uses it."""
    return text_encoder(input_ids.to(text_encoder.device))[0]


def encode_prompt_with_two(
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    input_ids: Int[Tensor, "b tokens"],
    input_ids_2: Int[Tensor, "b tokens"],
) -> tuple[Float[Tensor, "b tokens dim"], Float[Tensor, "b width"]]:
    """Return what SDXL is told (arXiv:2307.01952, section 2.1).

    Returns:
        The hidden states before the last layer of both text encoders side by side, and the pooled, projected embedding
        of the second.
    """
    first = text_encoder(input_ids.to(text_encoder.device), output_hidden_states=True)
    second = text_encoder_2(input_ids_2.to(text_encoder_2.device), output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def embed(
    text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModelWithProjection | None, conditioning: Conditioning
) -> Conditioning:
    """Return conditioning with the embeddings of its token ids.

    Args:
        text_encoder: The text encoder.
        text_encoder_2: The second one, where the model has two.
        conditioning: Has token ids for each of them.
    """
    if text_encoder_2 is None:
        return replace(conditioning, prompt_embeds=encode_prompt(text_encoder, conditioning.input_ids))
    assert conditioning.input_ids_2 is not None, "conditioning has no token ids for the second text encoder"
    embeds, pooled = encode_prompt_with_two(
        text_encoder, text_encoder_2, conditioning.input_ids, conditioning.input_ids_2
    )
    return replace(conditioning, prompt_embeds=embeds, pooled_embeds=pooled)


def whole_picture_time_ids(height: int, width: int, count: int) -> Float[Tensor, "b 6"]:
    """Return what SDXL is told of pictures that are neither resized nor cropped, as those that it draws."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(count, 1)
