"""New words in a model's vocabulary, with rows of their own beside the frozen embedding table.

The rows are the learned embeddings of Textual Inversion (arXiv:2208.01618), with ids after those of the vocabulary.
Because they stand beside the table and not in it, nothing in the table has a gradient, a state or a decay.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import AddedToken

from lowmem_db import fingerprint
from lowmem_db.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True)
class NewWord:
    """A new word.

    Attributes:
        token: Its spelling in prompts.
        num_vectors: Number of rows, each read as one token.
        vectors: Its rows for each text encoder, by component. Empty for a word that is about to be learned.
        initializer: Word whose row it starts with if it has none.
        origin: Where it comes from, for messages.
        way_out: How it gets another spelling, for messages.
    """

    token: str
    num_vectors: int = 1
    vectors: Mapping[str, Float[Tensor, "vectors width"]] = field(default_factory=dict)
    initializer: str | None = None
    origin: str = "textual_inversion.token"
    way_out: str = "choose another spelling, such as <my-dog>"

    @property
    def tokens(self) -> list[str]:
        """Spellings of its rows, those of diffusers: ``<dog>``, ``<dog>_1``, ``<dog>_2``."""
        return [self.token, *(f"{self.token}_{number}" for number in range(1, self.num_vectors))]

    def key(self) -> str:
        """Return a key of its content."""
        rows = {name: fingerprint.of_values(rows.tolist()) for name, rows in self.vectors.items()}
        return fingerprint.of_values(self.token, self.num_vectors, rows, self.initializer)


class ExtendedEmbedding(nn.Embedding):
    """An embedding table with more rows, in fp32, beside it.

    Args:
        table: The table, whose parameter is shared.
        first_id: Id of the first new row.
        rows: The new rows; not part of the state dict, so that published names of the table stay valid.
    """

    learned: nn.Parameter | None

    def __init__(self, table: nn.Embedding, first_id: int, rows: Float[Tensor, "vectors width"]) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight.detach())
        self.weight = table.weight
        self.first_id = first_id
        self.register_buffer("rows", rows.float(), persistent=False)
        self.register_parameter("learned", None)

    def new_rows(self) -> Float[Tensor, "vectors width"]:
        """Return all new rows; those that are learned come last."""
        rows: Any = self.rows
        return rows if self.learned is None else torch.cat([rows, self.learned])

    def learn(self, count: int) -> None:
        """Make the last rows trainable."""
        rows = self.new_rows().detach()
        self.rows = rows[: len(rows) - count].clone()
        self.learned = nn.Parameter(rows[len(rows) - count :].clone())

    def stop_learning(self) -> None:
        """Make no row trainable."""
        self.rows = self.new_rows().detach().clone()
        self.learned = None

    def forward(self, input: Int[Tensor, "b tokens"]) -> Float[Tensor, "b tokens width"]:
        """Return the embeddings of token ids, in the table's type."""
        is_new = input >= self.first_id
        known = functional.embedding(input.masked_fill(is_new, 0), self.weight)
        new = functional.embedding((input - self.first_id).clamp(min=0), self.new_rows()).to(known.dtype)
        return torch.where(is_new[..., None], new, known)


def add_to_tokenizer(tokenizer: Any, words: Sequence[NewWord]) -> None:
    """Add words to a tokenizer; one that looks like a usual word is not read inside others.

    Raises:
        ConfigError: A spelling cannot be a new word of this vocabulary, or is given twice.
    """
    origins: dict[str, str] = {}
    for word in words:
        if (other := origins.setdefault(word.token, word.origin)) is not word.origin:
            raise ConfigError(f"{word.origin}: {word.token!r} is the word of {other} too; leave one of them out")
        _check_spelling(tokenizer, word)
        tokenizer.add_tokens([AddedToken(token, single_word=_is_like_a_word(token)) for token in word.tokens])
    for word in words:
        _check_reading(tokenizer, word)


def expanded(tokenizer: Any, prompt: str) -> str:
    """Return a prompt in which a word with several rows is followed by the spellings of the others, as in diffusers."""
    added = tokenizer.added_tokens_encoder
    for token in added:
        if f"{token}_1" in added and token in prompt:
            others = 1
            while f"{token}_{others + 1}" in added:
                others += 1
            whole = " ".join([token, *(f"{token}_{i}" for i in range(1, others + 1))])
            edge = r"\b" if _is_like_a_word(token) else ""
            prompt = re.sub(f"{edge}{re.escape(token)}{edge}", lambda _, whole=whole: whole, prompt)
    return prompt


def extend(text_encoder: Any, component: str, tokenizer: Any, words: Sequence[NewWord]) -> None:
    """Give a text encoder the rows of new words.

    Args:
        text_encoder: Changed in place.
        component: Its component name.
        tokenizer: Its tokenizer, which knows the words; None on the meta device.
        words: The words.

    Raises:
        ConfigError: An initializer is not one token.
    """
    table = text_encoder.get_input_embeddings()
    rows = torch.cat([_rows(table, component, tokenizer, word) for word in words])
    first_id = table.num_embeddings if tokenizer is None else tokenizer.convert_tokens_to_ids(words[0].token)
    text_encoder.set_input_embeddings(ExtendedEmbedding(table, first_id, rows))


def find_extended(module: nn.Module) -> ExtendedEmbedding | None:
    """Return the extended table in a component, or None if it has none."""
    return next((table for table in module.modules() if isinstance(table, ExtendedEmbedding)), None)


def extended_embedding(text_encoder: nn.Module) -> ExtendedEmbedding:
    """Return the extended table of a text encoder that has new words."""
    table = find_extended(text_encoder)
    assert table is not None, "the model was loaded without new words"
    return table


def check_widths(word: NewWord, widths: Mapping[str, int]) -> None:
    """Refuse a word that was learned on another kind of model.

    Args:
        word: A word, with or without rows.
        widths: Width of each text encoder's embeddings, by component.

    Raises:
        ConfigError: Its rows do not have these widths.
    """
    found = {component: rows.shape[-1] for component, rows in word.vectors.items()}
    if found and found != widths:
        raise ConfigError(
            f"model.embeddings: {word.token!r} has vectors of {_listed(found)} numbers, but this model's have "
            f"{_listed(widths)}; it was learned on another kind of model. Use one of this kind"
        )


def initial_id(tokenizer: Any, initializer: str) -> int:
    """Return the token id of the word that an embedding starts as.

    Raises:
        ConfigError: It is not one token.
    """
    token_ids = tokenizer.encode(initializer, add_special_tokens=False)
    if len(token_ids) != 1:
        raise ConfigError(
            f"textual_inversion.initializer: {initializer!r} is {len(token_ids)} tokens for this model; allowed: a "
            "word that is one token, such as the class noun (dog, toy, painting)"
        )
    return token_ids[0]


def _rows(table: nn.Embedding, component: str, tokenizer: Any, word: NewWord) -> Tensor:
    if tokenizer is None:
        return torch.empty(word.num_vectors, table.embedding_dim, device=table.weight.device)
    if word.initializer is not None:
        row = table.weight.detach()[initial_id(tokenizer, word.initializer)]
        return row.float().repeat(word.num_vectors, 1)
    return word.vectors[component].to(table.weight.device, torch.float32)


def _listed(widths: Mapping[str, int]) -> str:
    return " and ".join(map(str, widths.values()))


def _check_spelling(tokenizer: Any, word: NewWord) -> None:
    known = set(word.tokens) & (tokenizer.added_tokens_encoder.keys() | tokenizer.get_vocab().keys())
    if known or len(tokenizer.encode(word.token, add_special_tokens=False)) == 1:
        raise ConfigError(
            f"{word.origin}: {word.token!r} is already a word of this model's vocabulary and cannot get a new meaning; "
            f"{word.way_out}"
        )


def _check_reading(tokenizer: Any, word: NewWord) -> None:
    """Refuse a spelling that is not read as one word inside a prompt."""
    new = tokenizer.convert_tokens_to_ids(word.token)
    around = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", "dog")]
    if tokenizer.encode(f"a {word.token} dog", add_special_tokens=False) != [*around[0], new, *around[1]]:
        raise ConfigError(
            f"{word.origin}: {word.token!r} cannot be a new word: the tokenizer does not read it as one; {word.way_out}"
        )


def _is_like_a_word(token: str) -> bool:
    """Return whether it begins and ends with letters, digits or underscores, so that other words may have it inside."""
    return re.fullmatch(r"\w(.*\w)?", token) is not None
