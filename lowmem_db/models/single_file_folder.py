"""From a single file to a folder in diffusers' layout, written once into the cache, one tensor at a time.

From then on the model is like any other: each component is loaded on its own and has a content key.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lowmem_db import fingerprint
from lowmem_db.config.schema import default_cache_dir
from lowmem_db.console import say
from lowmem_db.models.families.original_layout import Entry
from lowmem_db.models.single_file import CONFIGS_DIR, SingleFile, recognise
from lowmem_db.models.stored_tensor import StoredTensor
from lowmem_db.models.stored_weights import expected_shapes, weights_name
from lowmem_db.storage.checksums import write_checked_folder
from lowmem_db.storage.locks import locked
from lowmem_db.storage.tensor_stream import FLOAT8, StreamedTensor, write_streamed

_FORMAT_VERSION = 1
_VOCABULARY_DIR = CONFIGS_DIR / "clip_tokenizer"


def folder_of_file(file: Path, cache_dir: Path | None = None) -> Path:
    """Return the folder of a single file's model, writing it if the cache does not have it.

    Args:
        file: The single file.
        cache_dir: The cache. Default: the usual one.

    Raises:
        ModelError: It is not a complete Stable Diffusion model.
        StorageError: The disk is full.
    """
    model = recognise(file)
    say(model.remark)
    key = fingerprint.of_values(_FORMAT_VERSION, fingerprint.of_file(file), model.configs, model.path.name)
    folder = (cache_dir or default_cache_dir()) / "models" / f"{file.stem}-{key[:16]}"
    if not folder.is_dir():
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                say(f"writing it once as a folder in diffusers' layout: {folder}")
                write_checked_folder(folder, lambda temporary: write_model(model, temporary))
    return folder


def write_model(model: SingleFile, folder: Path) -> None:
    """Fill a folder with the components of a single file, in the types they have in it; fp8 becomes fp16."""
    for component in model.family.components:
        target = folder / component.name
        target.mkdir()
        if component.role == "tokenizer":
            shutil.copytree(model.path / component.name, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
            shutil.copytree(_VOCABULARY_DIR, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
            continue
        name = "scheduler_config.json" if component.role == "scheduler" else "config.json"
        _write_json(target / name, model.config_of(component.name))
        if component.has_weights:
            weights = _streamed(model, component.name)
            write_streamed(target / weights_name(model, component.name), weights, {"format": "pt"})
    index = json.loads((model.path / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", model.config_of("scheduler")["_class_name"]]
    _write_json(folder / "model_index.json", index)


def _streamed(model: SingleFile, component: str) -> dict[str, StreamedTensor]:
    shapes = expected_shapes(model, component)
    return {
        name: _source(entry, model.tensors[entry.name], name, shapes[name])
        for entry in model.entries(component, shapes)
        for name in entry.sources
    }


def _source(entry: Entry, stored: StoredTensor, name: str, shape: tuple[int, ...]) -> StreamedTensor:
    dtype = torch.float16 if stored.dtype in FLOAT8 else stored.dtype
    return StreamedTensor(shape, dtype, lambda: entry.unpack(stored.read().to(dtype), name, shape))


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
