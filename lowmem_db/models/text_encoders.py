"""Running prompts through all tokenizers and text encoders of a model, whatever its family."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.data.batches import PromptTable
from lowmem_db.errors import NonFiniteError
from lowmem_db.finite import first_not_finite, is_finite
from lowmem_db.models.families.base import Reading
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.models.new_words import expanded


def load_text_encoders(
    model: ModelFolder, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """Load the text encoders, frozen and in evaluation mode, by component."""
    return {name: model.load(name, device, dtype) for name in model.family.text_encoders}


def tokenize_prompts(model: ModelFolder, prompts: Sequence[str]) -> PromptTable:
    """Return a table of prompts with their tokens and without embeddings."""
    tokens = model.family.tokenize(model, prompts)
    return PromptTable.of(prompts, tokens, zeroes_empty_prompt=model.family.zeroes_empty_prompt(model))


def read_otherwise(model: ModelFolder) -> list[list[int | None]]:
    """Return what belongs into a key if prompts are not read in the usual way; keys of the usual way stay the same."""
    reading = model.family.reading
    return [] if reading == Reading() else [[reading.clip_skip, reading.num_chunks]]


def num_cut_tokens(tokenizer: Any, prompt: str, num_chunks: int = 1) -> int:
    """Return how many tokens of a prompt are cut off if it is read in some number of chunks."""
    words = tokenizer(expanded(tokenizer, prompt), add_special_tokens=False, verbose=False).input_ids
    return max(0, len(words) - num_chunks * _words_in_chunk(tokenizer))


def _words_in_chunk(tokenizer: Any) -> int:
    return tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()


def cut_prompt_warnings(model: ModelFolder, prompts: Iterable[str]) -> list[str]:
    """Return a warning for each prompt that is longer than the model reads."""
    warnings = []
    for name in model.family.names_of("tokenizer")[:1]:  # all of them read the same words
        tokenizer = model.load(name)
        for prompt in sorted(set(prompts)):
            chunks = model.family.reading.num_chunks
            if cut := num_cut_tokens(tokenizer, prompt, chunks):
                needed = chunks - (-cut // _words_in_chunk(tokenizer))
                reads_all = f"to read all of it, set model.prompt_chunks={needed}"
                warnings.append(
                    f"the model reads {tokenizer.model_max_length * chunks} tokens and ignores the last {cut} of "
                    f"{prompt!r}; {reads_all if model.family.reads_in_chunks else 'shorten it'}"
                )
    return warnings


@torch.no_grad()
def embed_prompts(model: ModelFolder, text_encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> PromptTable:
    """Return a table of prompts with their embeddings, in host memory, computed in one batch without gradients.

    Args:
        model: The model, for its tokenizers.
        text_encoders: Its loaded text encoders, by component.
        prompts: The prompts.
    """
    table = tokenize_prompts(model, prompts)
    embeds = model.family.encode(text_encoders, table.conditioning(prompts).tokens)
    check_embeds(model, embeds, prompts)
    return table.with_embeds(prompts, {name: rows.cpu() for name, rows in embeds.items()})


def check_embeds(model: ModelFolder, embeds: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    """Refuse embeddings that are infinite or NaN.

    Args:
        model: The model that made them.
        embeds: One row for each prompt.
        prompts: The prompts, for messages.

    Raises:
        NonFiniteError: One is; the message names its prompt.
    """
    if (name := first_not_finite(embeds)) is None:
        return
    rows = embeds[name]
    prompt = next(prompt for prompt, row in zip(prompts, rows, strict=True) if not is_finite(row))
    kind = str(rows.dtype).removeprefix("torch.")
    folder = model.folder_of(model.family.text_encoders[0])
    raise NonFiniteError(
        f"{folder}: the text encoder's embedding of {prompt!r} is infinite or NaN "
        f"({name}, computed in {kind}); download the model again, or, if it is whole, compute in fp32"
    )
