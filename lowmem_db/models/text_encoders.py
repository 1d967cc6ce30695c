"""Prompts through all tokenizers and text encoders of a model, whatever its family."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowmem_db.data.batches import PromptTable
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU


def load_text_encoders(
    model: ModelFolder, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """Load the text encoders in evaluation mode, frozen, by the names of their components."""
    return {name: model.load(name, device, dtype) for name in model.family.text_encoders}


def tokenize_prompts(model: ModelFolder, prompts: Sequence[str]) -> PromptTable:
    """Return a table of prompts with what the model's tokenizers make of them, and no embeddings."""
    tokens = model.family.tokenize(model, prompts)
    return PromptTable.of(prompts, tokens, zeroes_empty_prompt=model.family.zeroes_empty_prompt(model))


def num_cut_tokens(tokenizer: Any, prompt: str) -> int:
    """Return how many tokens of a prompt the model will not see."""
    return max(0, len(tokenizer(prompt, verbose=False).input_ids) - tokenizer.model_max_length)


@torch.no_grad()
def embed_prompts(model: ModelFolder, text_encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> PromptTable:
    """Return a table of prompts with their embeddings on the host, made in one batch without gradients.

    Args:
        model: Where the tokenizers are.
        text_encoders: The text encoders in memory.
        prompts: The prompts.
    """
    table = tokenize_prompts(model, prompts)
    embeds = model.family.encode(text_encoders, table.conditioning(prompts).tokens)
    return table.with_embeds(prompts, {name: rows.cpu() for name, rows in embeds.items()})
