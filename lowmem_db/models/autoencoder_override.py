"""Another autoencoder in place of a model's own: such as one of SDXL's that is safe in fp16."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lowmem_db import fingerprint
from lowmem_db.config.schema import default_cache_dir
from lowmem_db.console import say
from lowmem_db.errors import ModelError
from lowmem_db.models.families.original_layout import SD1, VAE_PREFIX
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.reading import same_shape
from lowmem_db.models.stored_tensor import StoredTensor, read_header
from lowmem_db.models.stored_weights import expected_shapes
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.checksums import write_checked_folder
from lowmem_db.storage.locks import locked
from lowmem_db.storage.tensor_stream import FLOAT8, StreamedTensor, write_streamed

AUTOENCODER_FILE = "diffusion_pytorch_model.safetensors"
_FORMAT_VERSION = 1
_MUST_AGREE = {"latent_channels": 4, "scaling_factor": 0.18215}
"""Facts about latents, with diffusers' defaults."""


def with_autoencoder(
    model: ModelFolder, name: str, found: Path, *, cache_dir: Path | None = None, weights: bool = True
) -> ModelFolder:
    """Return a model with another autoencoder.

    Args:
        model: The model.
        name: What the user called the autoencoder.
        found: A folder in diffusers' layout, of an autoencoder or of a whole model, or a single file in diffusers' or
            in the original layout. A single file has the configuration of the model's own autoencoder.
        cache_dir: Where the folders of single files are kept. Default: the usual cache.
        weights: Whether weights are needed; if not, nothing is written.

    Raises:
        ModelError: The model has none, or the autoencoder is for other models.
    """
    components = model.family.names_of("autoencoder")
    if not components:
        raise ModelError(f"model.vae: {name} has no effect on {model.name}, which has no autoencoder; leave it out")
    component = components[0]
    if found.is_file():
        own = _read_file(model, component, name, found)
        if not weights:
            return model
        folder = _folder_of_file(model, component, found, own, cache_dir)
    else:
        folder = _folder_in(name, found)
        _check(model, component, name, folder)
    say(f"the autoencoder is {name} instead of the model's own")
    return replace(model, replaced={**model.replaced, component: folder})


def _folder_in(name: str, folder: Path) -> Path:
    for candidate in (folder, folder / "vae"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ModelError(
        f"model.vae: {name} has neither config.json nor vae/config.json; allowed: an autoencoder in diffusers' layout, "
        "by itself or in a model"
    )


def _check(model: ModelFolder, component: str, name: str, folder: Path) -> None:
    """Refuse an autoencoder whose latents are not those of the model."""
    other = replace(model, replaced={component: folder})
    own, new = model.config_of(component), other.config_of(component)
    facts = [(key, own.get(key, default), new.get(key, default)) for key, default in _MUST_AGREE.items()]
    if "block_out_channels" not in new:
        raise ModelError(f"model.vae: {folder / 'config.json'} is not of an autoencoder; allowed: an AutoencoderKL")
    facts.append(("pixels per latent pixel", model.space.cell, other.space.cell))
    for key, before, now in facts:
        if before != now:
            raise ModelError(
                f"model.vae: {name} has {key} {now} instead of {before}: it is for other models; leave it out, or use "
                "one for this model"
            )


def _read_file(model: ModelFolder, component: str, name: str, file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a single file under their names in diffusers' layout.

    Raises:
        ModelError: They are not those of such an autoencoder.
    """
    kind = model.config_of(component).get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ModelError(f"model.vae: {name} is a single file, which cannot hold {kind}; allowed: a folder")
    shapes = expected_shapes(model, component)
    tensors = read_header(file)[0]
    layout = model.family.layout or SD1
    found: dict[str, StoredTensor] = {}
    for entry in layout.entries(component, model.config_of(component), shapes):
        (source,) = entry.sources
        stored = _stored(tensors, entry.name, source)
        if stored is None or not same_shape(stored.shape, shapes[source]):
            what = "missing" if stored is None else list(stored.shape)
            raise ModelError(
                f"model.vae: {name} is not an autoencoder for {model.family.name} ({source} is {what}); allowed: one "
                "in diffusers' or in the original layout"
            )
        found[source] = stored
    return found


def _stored(tensors: Mapping[str, StoredTensor], published: str, ours: str) -> StoredTensor | None:
    bare = published.removeprefix(VAE_PREFIX)
    names = (published, bare, f"vae.{bare}", ours, f"vae.{ours}")
    return next((tensors[name] for name in names if name in tensors), None)


def _folder_of_file(
    model: ModelFolder,
    component: str,
    file: Path,
    own: Mapping[str, StoredTensor],
    cache_dir: Path | None,
) -> Path:
    """Return the folder of a single file in the cache, which is written if it does not exist."""
    config = model.config_of(component)
    key = fingerprint.of_values("vae", _FORMAT_VERSION, fingerprint.of_file(file), config)
    folder = (cache_dir or default_cache_dir()) / "models" / f"vae-{file.stem}-{key[:16]}"
    if folder.is_dir():
        return folder
    shapes = expected_shapes(model, component)

    def fill(temporary: Path) -> None:
        write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
        tensors = {name: _streamed(stored, shapes[name]) for name, stored in own.items()}
        write_streamed(temporary / AUTOENCODER_FILE, tensors, {"format": "pt"})

    with locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            write_checked_folder(folder, fill)
    return folder


def _streamed(stored: StoredTensor, shape: tuple[int, ...]) -> StreamedTensor:
    dtype = torch.float16 if stored.dtype in FLOAT8 else stored.dtype
    return StreamedTensor(shape, dtype, lambda: stored.read().to(dtype).reshape(shape))
