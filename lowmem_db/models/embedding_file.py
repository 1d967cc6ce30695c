"""Files of learned embeddings (Textual Inversion): written for and read from diffusers, AUTOMATIC1111 and ComfyUI.

For one text encoder a file holds one tensor, named after the word (diffusers; AUTOMATIC1111 and ComfyUI take any single
tensor, and the name of the file as the word). For SDXL it holds ``clip_l`` and ``clip_g``, the names of all three.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lowmem_db.errors import ModelError, StorageError
from lowmem_db.models.new_words import NewWord
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.places import EMBEDDING_FILE, EMBEDDINGS_DIR
from lowmem_db.storage.tensors import read_tensors, write_tensors

_TOKEN = "lowmem_db_token"
_OF_SDXL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_WITHOUT_WORD = frozenset(("emb_params", "clip_l", "clip_g", "clip_h", "*"))
_DAMAGED = (UnpicklingError, OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)
_RENAME = "rename the file, whose name is the word, to one such as my-dog"
_SAVE_AGAIN = (
    "learn it again with another textual_inversion.token, or save its tensor as emb_params into a safetensors file, "
    "whose name is the word then"
)
_ALLOWED = "a file of Textual Inversion from diffusers, AUTOMATIC1111 or ComfyUI"


def write_embedding(file: Path, word: NewWord, base: SuggestedBase) -> None:
    """Write a word.

    Args:
        file: The file.
        word: The word, with its rows for each text encoder.
        base: Its base model.
    """
    if len(word.vectors) == 1:
        tensors = {word.token: next(iter(word.vectors.values()))}
    else:
        tensors = {_OF_SDXL[component]: rows for component, rows in word.vectors.items()}
    metadata = {"format": "pt", _TOKEN: word.token} | base.metadata()
    write_tensors(file, {name: rows.cpu().contiguous() for name, rows in tensors.items()}, metadata)


def read_embedding(path: Path) -> NewWord:
    """Read a word from a safetensors file, from a pickled one with ``weights_only=True``, or from a finished run.

    Raises:
        ModelError: It is missing or damaged, or holds no embedding.
    """
    return _read(_file_in(path) if path.is_dir() else path)[0]


def files_of_words(words: Sequence[NewWord]) -> list[tuple[str, NewWord]]:
    """Return the learned words of a model and names of files for them, by which AUTOMATIC1111 and ComfyUI know them."""
    learned = [word for word in words if word.vectors]
    bare = [re.sub(r"[^\w-]", "", word.token) or "word" for word in learned]
    numbered = [name if bare.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(bare)]
    return [(f"{name}.safetensors", word) for name, word in zip(numbered, learned, strict=True)]


def write_words(folder: Path, words: Sequence[NewWord]) -> None:
    """Write the learned words that a model was trained with beside it: it can be drawn with wherever it is.

    Args:
        folder: Folder of the model.
        words: Its words; those without rows are left out.
    """
    for name, word in files_of_words(words):
        (folder / EMBEDDINGS_DIR).mkdir(exist_ok=True)
        write_embedding(folder / EMBEDDINGS_DIR / name, word, SuggestedBase())


def words_beside(folder: Path) -> list[Path]:
    """Return the files of :func:`write_words`."""
    return sorted((folder / EMBEDDINGS_DIR).glob("*.safetensors"))


def read_base(file: Path) -> SuggestedBase:
    """Return what a file from :func:`write_embedding` says of its base model; other files say nothing.

    Raises:
        ModelError: It is missing or damaged, or holds no embedding.
    """
    metadata = _read(file)[1]
    try:
        return SuggestedBase.of(metadata)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: its metadata is damaged ({' '.join(str(error).split())[:200]})") from error


def _file_in(folder: Path) -> Path:
    found = [file for place in (folder / "final", folder) if (file := place / EMBEDDING_FILE).is_file()]
    if found:
        return found[0]
    raise ModelError(
        f"model.embeddings: {folder} holds no {EMBEDDING_FILE}; allowed: a finished run of Textual Inversion, or "
        f"{_ALLOWED}"
    )


def _read(file: Path) -> tuple[NewWord, Mapping[str, str]]:
    if not file.is_file():
        raise ModelError(f"model.embeddings: {file} does not exist; allowed: {_ALLOWED}")
    content, metadata = _read_safetensors(file) if file.suffix == ".safetensors" else (_read_pickled(file), {})
    tensors, name = _tensors_in(file, content)
    inside = metadata.get(_TOKEN) or name
    way_out = _RENAME if inside is None else _SAVE_AGAIN
    if set(_OF_SDXL.values()) <= tensors.keys():
        vectors = {component: _as_rows(file, tensors[key]) for component, key in _OF_SDXL.items()}
    else:
        vectors = {"text_encoder": _as_rows(file, next(iter(tensors.values())))}
    counts = {len(rows) for rows in vectors.values()}
    if len(counts) != 1:
        raise ModelError(f"model.embeddings: {file} has unlike numbers of vectors for the two text encoders")
    word = NewWord(
        token=inside or file.stem,
        num_vectors=counts.pop(),
        vectors=vectors,
        origin=f"model.embeddings: {file}",
        way_out=way_out,
    )
    return word, metadata


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_tensors(file)
    except StorageError as error:
        reason = str(error).removesuffix("; delete it")
        raise ModelError(f"model.embeddings: {reason}; get the file again, or export it again from its run") from error


def _read_pickled(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle, which is refused or read safely
            return torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGED as error:  # whose text says how to run code that may be in the file
        raise ModelError(
            f"model.embeddings: {file} is damaged, or holds more than tensors, which may run code; allowed: {_ALLOWED}"
        ) from error


def _tensors_in(file: Path, content: Any) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a file, and the word that it names."""
    name = None
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        name = content.get("name") if isinstance(content.get("name"), str) else None
        content = content["string_to_param"]
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors or (len(tensors) > 1 and not set(_OF_SDXL.values()) <= tensors.keys()):
        raise ModelError(
            f"model.embeddings: {file} holds {len(tensors)} tensors that are no embedding; allowed: {_ALLOWED}"
        )
    only = next(iter(tensors))
    return tensors, name or (None if only in _WITHOUT_WORD else only)


def _as_rows(file: Path, tensor: Tensor) -> Tensor:
    rows = tensor.detach().float()
    rows = rows[None] if rows.dim() == 1 else rows
    if not tensor.is_floating_point() or rows.dim() != 2 or not rows.numel() or not rows.isfinite().all():
        kind = f"{str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)}"
        raise ModelError(f"model.embeddings: {file} holds a {kind} that is no embedding; allowed: {_ALLOWED}")
    return rows
