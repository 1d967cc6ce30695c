"""The files of a model in diffusers' layout: a folder for each component."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowmem_db import fingerprint
from lowmem_db.data.file_kinds import HEAD_BYTES, kind_of
from lowmem_db.errors import ModelError
from lowmem_db.models.configurations import check_values
from lowmem_db.models.new_words import NewWord

_MAX_BYTES = 1 << 24
WEIGHT_SUFFIXES = {".safetensors", ".bin"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d{5}-of-\d{5})?(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"\.(?:safetensors|bin)"
)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Configurations and weights of a model, by component.

    Attributes:
        path: The folder.
        variant: Variant of the weight files.
        allow_pickle: Whether pickled weights may be read.
        words: New words of its vocabulary.
        replaced: Folders of components that come from elsewhere, always without a variant.
    """

    path: Path
    variant: str | None = None
    allow_pickle: bool = False
    words: tuple[NewWord, ...] = field(default=(), compare=False)
    replaced: Mapping[str, Path] = field(default_factory=dict)

    def folder_of(self, component: str) -> Path:
        """Return the folder of a component."""
        return self.replaced.get(component, self.path / component)

    def variant_of(self, component: str) -> str | None:
        """Return the variant of a component's weight files."""
        return None if component in self.replaced else self.variant

    def config_of(self, component: str) -> dict[str, Any]:
        """Return the JSON configuration of a component."""
        kind = "scheduler" if component.endswith("scheduler") else component.partition("_")[0]
        file = self.folder_of(component) / _CONFIG_FILES.get(kind, "config.json")
        config = read_json(file)
        if kind != "tokenizer":
            check_values(config, file)
        return config

    @property
    def index(self) -> dict[str, Any]:
        """The content of ``model_index.json``."""
        return read_json(self.path / "model_index.json")

    def has_weights(self, component: str) -> bool:
        """Return whether a component's folder holds weights."""
        return any(file.suffix in WEIGHT_SUFFIXES for file in self.folder_of(component).iterdir())

    def num_parameters(self, component: str) -> int:
        """Return the number of parameters in a component's weight files, read from their headers.

        Shards are added up; if the same weights are stored in several formats, the largest counts.
        """
        folder = self.folder_of(component)
        files = weight_files(folder, self.variant_of(component))
        files = files or [file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES]
        wholes: dict[str, int] = {}
        for file in files:
            whole = _SHARD.sub("", file.name)
            wholes[whole] = wholes.get(whole, 0) + _num_values(file)
        return max(wholes.values())

    def content_key(self, *components: str) -> str:
        """Return a key of the bytes of some components, configurations and weights together, in the order given."""
        keys = []
        for component in components:
            files = [file for file in sorted(self.folder_of(component).iterdir()) if file.is_file()]
            keys.append((component, fingerprint.of_files(files)))
        key = fingerprint.of_values(keys, self.variant)
        reads_words = any(component.startswith(("tokenizer", "text_encoder")) for component in components)
        return fingerprint.of_values(key, [word.key() for word in self.words]) if self.words and reads_words else key

    def loaded_key(self, *components: str) -> str:
        """Return a key of what is loaded of some components, whatever else lies in their folders.

        Other than :meth:`content_key` it does not change when another variant is downloaded, or a README.
        """
        keys = []
        for component in components:
            folder = self.folder_of(component)
            files = [
                *weight_files(folder, self.variant_of(component)),
                *(folder / name for name in _READ if (folder / name).is_file()),
            ]
            keys.append((component, sorted(fingerprint.of_file(file) for file in files)))
        return fingerprint.of_values(keys)


_READ = (
    "config.json", "scheduler_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "spiece.model",
)  # fmt: skip
_CONFIG_FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files of a component that are loaded: one file, or its shards; none if there are none.

    They are those of a variant, safetensors rather than pickles, and a whole file rather than shards.
    """
    found = [file for file in sorted(folder.glob("*")) if _WEIGHTS.fullmatch(file.name)]
    own = [file for file in found if variant_of(file.name) == variant]
    own = [file for file in own if file.suffix == ".safetensors"] or own
    return [file for file in own if not _SHARD.search(file.name)][:1] or own


def safetensors_of(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files of a component as :func:`weight_files` does; none if they are pickled."""
    return [file for file in weight_files(folder, variant) if file.suffix == ".safetensors"]


def variant_of(name: str) -> str | None:
    """Return the variant in the name of a weight file, or None."""
    match = _WEIGHTS.fullmatch(name)
    return match[1] if match else None


def check_header(file: Path) -> None:
    """Refuse a file of weights that is cut off, or is something else.

    Raises:
        ModelError: The message says what the file is.
    """
    if file.suffix == ".safetensors":
        _num_values(file)
    elif (kind := _kind(file)) is not None and "ZIP" not in kind:
        raise ModelError(f"{file}: is {kind}; allowed: weights. Download the model again")


def damaged(file: Path, error: Exception) -> ModelError:
    """Return the error for a safetensors file that cannot be read: it is of another kind, or damaged."""
    if not file.is_file() or not os.access(file, os.R_OK):
        return ModelError(f"{file}: cannot be read ({error}); allowed: a .safetensors file. Check its permissions")
    if (kind := _kind(file)) is not None:
        return ModelError(f"{file}: is {kind}; allowed: a .safetensors file")
    return ModelError(f"{file}: is truncated or not a safetensors file ({error}); download the model again")


def _kind(file: Path) -> str | None:
    with file.open("rb") as opened:
        return kind_of(opened.read(HEAD_BYTES))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model.

    Raises:
        ModelError: It is missing, damaged, or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"has {path.stat().st_size:,} bytes; allowed: {_MAX_BYTES:,}")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}, not a JSON object")
        return found
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing; a complete folder in diffusers' layout is needed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is damaged ({' '.join(str(error).split())}); download the model again") from error


def _num_values(file: Path) -> int:
    if file.suffix != ".safetensors":
        return file.stat().st_size // 4
    try:
        with safe_open(file, framework="pt") as weights:
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error
