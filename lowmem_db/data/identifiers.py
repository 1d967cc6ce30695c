"""Rare-token identifiers (Ruiz et al. 2022, arXiv:2208.12242, section 3.2).

The identifier names the subject in the prompt. A word that the model knows brings its meaning along, and a random
string such as ``xxy5syt00`` is split into letters that each have a meaning. The paper therefore draws rare tokens from
the model's vocabulary and turns them back into text.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from lowmem_db.errors import ConfigError
from lowmem_db.randomness import generator

MAX_TOKENS = 3
"""Longest sequence that worked well in the paper."""
MAX_CHARACTERS = 3
"""Maximum number of Unicode characters per token."""
_MAX_TRIES = 2000
_SENTENCEPIECE_SPACE = "\u2581"


@runtime_checkable
class Tokenizer(Protocol):
    """The methods of a tokenizer that are used here; those of transformers have them."""

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into ids."""
        ...

    def decode(self, token_ids: list[int]) -> str | list[str]:
        """Turn ids into text."""
        ...


@dataclass(frozen=True)
class Identifier:
    """A rare identifier: its text and the token ids of the text."""

    text: str
    token_ids: tuple[int, ...]


def rare_identifiers(
    tokenizer: Tokenizer,
    *,
    count: int,
    seed: int = 0,
    num_tokens: int | None = None,
    rank_range: tuple[int, int] | None = None,
) -> list[Identifier]:
    """Draw identifiers uniformly from the sequences of rare tokens, without repeats.

    Args:
        tokenizer: The model's tokenizer.
        count: How many identifiers to draw; a longer list starts with the shorter one.
        seed: The same seed gives the same identifiers.
        num_tokens: Tokens per identifier, 1 to 3. Default: each length equally often; for T5 not 1, because its single
            tokens of these ranks are words that people use ("las", "try").
        rank_range: First rank, and the one after the last. Default: :func:`default_rank_range`.

    Raises:
        ConfigError: There are not enough identifiers.

    Reference: Ruiz et al. 2022, arXiv:2208.12242, section 3.2.
    """
    ranks = rank_range or default_rank_range(tokenizer)
    tokens = rare_tokens(tokenizer, ranks)
    lengths = _lengths(num_tokens, shortest=2 if _is_sentencepiece(tokenizer) else 1)
    found: dict[str, Identifier] = {}
    for place in range(count):
        draws = _draws(tokens, lengths, generator(seed, "identifiers", place))
        inverted = (invert(tokenizer, token_ids) for token_ids in draws)
        new = next((one for one in inverted if one is not None and one.text not in found), None)
        if new is None:
            raise ConfigError(_too_few(count, lengths, ranks, len(found), len(tokenizer)))
        found[new.text] = new
    return list(found.values())


def default_rank_range(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ranks to search for identifiers: the first, and the one after the last.

    T5 (SentencePiece): 5000 to 10000, both included, as in the paper. CLIP's ids are ranks too: after the 512 bytes
    they follow its merges, which byte-pair encoding makes in the order of their frequency. The range is the last
    fifth, 39526 to 49408 for Stable Diffusion. Merges that late mostly make long words ("stargazing",
    "expeditions"), so a token of three letters there is very rare in the tokenizer's training text, yet frequent
    enough to have a trained embedding. The identifiers that are known to work lie in this range (``ohwx`` 47993,
    ``sks`` 48136). Some of its single tokens are abbreviations that the model knows (``hmv``); two or three in a
    row hardly ever are. A fifth also suits the demo model, whose vocabulary is a prefix of CLIP's.
    """
    size = len(tokenizer)
    return (5_000, 10_001) if _is_sentencepiece(tokenizer) else (size * 4 // 5, size)


def _is_sentencepiece(tokenizer: Tokenizer) -> bool:
    return _SENTENCEPIECE_SPACE in tokenizer.get_vocab() and len(tokenizer) > 10_000


def rare_tokens(tokenizer: Tokenizer, rank_range: tuple[int, int]) -> list[int]:
    """Return the ids in a rank range whose text is at most 3 letters or digits.

    The paper allows any 3 Unicode characters without spaces. Here only ASCII letters and digits are allowed, because an
    identifier has to survive keyboards, shells, YAML and the terminals of all systems.
    """
    ranks = range(max(0, rank_range[0]), min(len(tokenizer), rank_range[1]))
    texts = ((rank, _text(tokenizer, [rank])) for rank in ranks)
    return [rank for rank, text in texts if _is_typeable(text) and len(text) <= MAX_CHARACTERS]


def invert(tokenizer: Tokenizer, token_ids: tuple[int, ...]) -> Identifier | None:
    """Return the identifier with exactly these token ids, or None if no text without spaces has them."""
    text = _text(tokenizer, list(token_ids))
    if not _is_typeable(text) or tuple(tokenizer.encode(text, add_special_tokens=False)) != token_ids:
        return None
    return Identifier(text, token_ids)


def identifier_warnings(
    prompt: str, class_prompt: str | None, tokenizer: Tokenizer, listed_by: str = "lowmem-db identifiers"
) -> list[str]:
    """Explain what is wrong with the identifier in a prompt, in words for people who are new to DreamBooth.

    The identifier is one of the words that the instance prompt has and the class prompt does not.

    Args:
        prompt: The instance prompt.
        class_prompt: The class prompt; without one every word may be the identifier.
        tokenizer: The model's tokenizer.
        listed_by: The command that lists rare words of this tokenizer.
    """
    class_words = {word.casefold() for word in _words(class_prompt or "")}
    own_words = [word for word in _words(prompt) if word.casefold() not in class_words]
    candidates = {word: tokenizer.encode(word, add_special_tokens=False) for word in own_words}
    split = {word: token_ids for word, token_ids in candidates.items() if len(token_ids) > MAX_TOKENS}
    if split:
        return [_split_warning(word, len(token_ids), listed_by) for word, token_ids in split.items()]
    first_rank = default_rank_range(tokenizer)[0]
    common = [word for word, token_ids in candidates.items() if len(token_ids) == 1 and token_ids[0] < first_rank]
    if len(common) < len(candidates):
        return []
    if common and class_prompt:
        return [_common_warning(prompt, common, listed_by)]
    return [_missing_warning(prompt, class_prompt, listed_by)]


def _lengths(num_tokens: int | None, *, shortest: int = 1) -> tuple[int, ...]:
    allowed = tuple(range(1, MAX_TOKENS + 1))
    if num_tokens is None:
        return allowed[shortest - 1 :]
    if num_tokens not in allowed:
        raise ConfigError(
            f"num_tokens: {num_tokens} is not possible; allowed: 1 to {MAX_TOKENS}, or None for all lengths"
        )
    return (num_tokens,)


def _draws(tokens: list[int], lengths: tuple[int, ...], source: torch.Generator) -> Iterator[tuple[int, ...]]:
    """Draw a length, and then sequences of that length."""
    length = lengths[int(torch.randint(len(lengths), (), generator=source))]
    for _ in range(_MAX_TRIES if tokens else 0):
        yield tuple(tokens[place] for place in torch.randint(len(tokens), (length,), generator=source).tolist())


def _too_few(count: int, lengths: tuple[int, ...], ranks: tuple[int, int], num_found: int, size: int) -> str:
    return (
        f"count: {count} identifiers of {' or '.join(map(str, lengths))} tokens were asked for, but ranks {ranks[0]} "
        f"to {ranks[1] - 1} have only {num_found}; allowed: ranks 0 to {size - 1}. Widen the range, or ask for fewer"
    )


def _is_typeable(text: str) -> bool:
    return text.isascii() and text.isalnum()


def _text(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids)).strip()


def _words(prompt: str) -> list[str]:
    stripped = (word.strip(string.punctuation) for word in prompt.split())
    return [word for word in stripped if word]


def _split_warning(word: str, num_tokens: int, listed_by: str) -> str:
    return (
        f"subject.instance_prompt: the identifier {word!r} is {num_tokens} tokens for this model, each with its own "
        f"meaning; 1 to {MAX_TOKENS} work well. `{listed_by}` lists rare ones"
    )


def _common_warning(prompt: str, words: list[str], listed_by: str) -> str:
    named = ", ".join(map(repr, words))
    return (
        f"subject.instance_prompt: {prompt!r} has no rare identifier: the model knows {named} well and mixes that "
        f"meaning into the subject. Use a rare word, as in 'a sks dog'; `{listed_by}` lists some"
    )


def _missing_warning(prompt: str, class_prompt: str | None, listed_by: str) -> str:
    reason = f"the class prompt {class_prompt!r} has all its words" if class_prompt else "the model knows all its words"
    return (
        f"subject.instance_prompt: {prompt!r} has no identifier, {reason}: the subject would replace the whole class. "
        f"Put a rare word before the class noun, as in 'a sks dog'; `{listed_by}` lists some"
    )
