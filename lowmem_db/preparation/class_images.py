"""Class images for prior preservation, drawn from the frozen model (arXiv:2208.12242, section 3.3).

A manifest beside the images records what they were drawn with. They are used again only where it matches, topped up
deterministically, and a killed run goes on with the next missing image. A folder without a manifest that holds pictures
belongs to the user and is used as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowmem_db import environment, fingerprint
from lowmem_db.adaptation.quantized import quantize
from lowmem_db.config.schema import Config
from lowmem_db.console import say, track
from lowmem_db.data.batches import PromptTable
from lowmem_db.errors import DataError
from lowmem_db.models.conditioning import whole_picture_time_ids
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.latents import decode_latents, downscaling
from lowmem_db.models.loading import (
    CPU,
    UNet2DConditionModel,
    load_autoencoder,
    load_noise_schedule,
    load_unet,
)
from lowmem_db.models.saving import DTYPES
from lowmem_db.models.source import ModelFolder
from lowmem_db.models.text_encoders import load_text_encoders, tokenize_prompts
from lowmem_db.randomness import generator
from lowmem_db.records import Conditioning, Size
from lowmem_db.sampling.images import to_images
from lowmem_db.sampling.latents import SamplingSettings, sample_prompt
from lowmem_db.storage.atomic import write_file
from lowmem_db.storage.run_folder import read_json, write_json

MANIFEST = "manifest.json"
_FORMAT_VERSION = 1
_IMAGES_PER_LOAD = 32  # what a killed run loses at most


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """Class images of one size.

    Attributes:
        folder: Where they are.
        size: Height and width in pixels.
        files: Those that were asked for; None: the folder is the user's own, and all of it counts.
    """

    folder: Path
    size: Size
    files: tuple[Path, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Set:
    """Class images that are to be drawn: their manifest, folder and size, and how many there shall be."""

    wanted: dict[str, Any]
    folder: Path
    size: Size
    count: int

    def missing(self) -> list[int]:
        return [index for index in range(self.count) if not _image_file(self.folder, index).is_file()]


def prepare_class_images(
    config: Config, model: ModelFolder, device: torch.device, counts: Mapping[Size, int]
) -> list[ClassImages]:
    """See to it that the class images are there; return them by size.

    Args:
        config: The configuration.
        model: The model that draws them.
        device: Where it draws.
        counts: How many there shall be of each size, in pixels.

    Raises:
        DataError: The folder holds class images of another model, prompt or sampler.
    """
    own = config.prior.class_dir
    if own is not None and _is_users_own(own):
        say(f"class images: the pictures in {own} are used as they are")
        return [ClassImages(folder=own, size=size, files=None) for size in counts]
    sets = [_set(config, model, device, size, count) for size, count in counts.items()]
    for one in sets:
        _check_manifest(one.folder, one.wanted)
    to_draw = [one for one in sets if one.missing()]
    for one in sets:
        if one in to_draw:
            say(f"class images: drawing {len(one.missing())} of {one.count} into {one.folder}")
        else:
            say(f"class images: all {one.count} are there, in {one.folder}")
    if to_draw:
        _draw(config, model, device, to_draw)
    return [
        ClassImages(
            folder=one.folder,
            size=one.size,
            files=tuple(_image_file(one.folder, index) for index in range(one.count)),
        )
        for one in sets
    ]


def _set(config: Config, model: ModelFolder, device: torch.device, size: Size, count: int) -> _Set:
    is_square = size == (config.data.resolution, config.data.resolution)
    wanted = _manifest(config, model, device, size[0] if is_square else list(size))
    if config.prior.class_dir is None:
        folder = config.cache_dir / "class_images" / fingerprint.of_values(wanted)
    else:
        folder = config.prior.class_dir if is_square else config.prior.class_dir / f"{size[1]}x{size[0]}"
    return _Set(wanted=wanted, folder=folder, size=size, count=count)


def _manifest(config: Config, model: ModelFolder, device: torch.device, resolution: int | list[int]) -> dict[str, Any]:
    return {
        "format_version": _FORMAT_VERSION,
        "model": model.content_key(*model.family.components),
        "prompt": config.subject.class_prompt,
        **asdict(_settings(config)),
        "resolution": resolution,
        "precision": _precision(config, device),
        "sample_batch_size": config.prior.sample_batch_size,
        "seed": config.seed,
    }


def _precision(config: Config, device: torch.device) -> str:
    """Return the type of the frozen UNet: that of a LoRA run where it is quantized, so that it fits here too."""
    if config.lora.base_weights in {"int8", "nf4"}:
        return str(config.lora.base_weights)
    return config.prior.precision or ("fp16" if device.type == "cuda" else "fp32")


def _settings(config: Config) -> SamplingSettings:
    return SamplingSettings(
        sampler=config.prior.sampler,
        num_inference_steps=config.prior.num_inference_steps,
        guidance_scale=config.prior.guidance_scale,
    )


def _is_users_own(folder: Path) -> bool:
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return False
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(not (entry / MANIFEST).is_file() for entry in entries)


def _check_manifest(folder: Path, wanted: dict[str, Any]) -> None:
    if not (folder / MANIFEST).is_file():
        return
    found = read_json(folder / MANIFEST) or {}
    differing = [
        f"{name} {found.get(name)!r}, not {value!r}" for name, value in wanted.items() if found.get(name) != value
    ]
    if differing:
        raise DataError(
            f"prior.class_dir: {folder} holds class images drawn otherwise ({'; '.join(differing)}); "
            "choose another folder, delete this one, or leave prior.class_dir out"
        )


def _draw(config: Config, model: ModelFolder, device: torch.device, sets: Sequence[_Set]) -> None:
    """Draw what is missing of some sets; the UNet and the autoencoder are in memory one after the other."""
    dtype = DTYPES.get(sets[0].wanted["precision"], torch.float16)
    conditioning = _embed(config, model, device, dtype)
    environment.release_memory(device)
    for one in sets:
        write_json(one.folder / MANIFEST, one.wanted)
    jobs = [(one, indices) for one in sets for indices in _whole_batches(one.missing(), config.prior.sample_batch_size)]
    at_once = max(1, _IMAGES_PER_LOAD // config.prior.sample_batch_size)
    for first in track(range(0, len(jobs), at_once), "class images", -(-len(jobs) // at_once)):
        some = jobs[first : first + at_once]
        unet = load_frozen_unet(config, model, device, dtype)
        latents = [draw_latents(config, model, unet, indices, conditioning, one.size) for one, indices in some]
        del unet
        environment.release_memory(device)
        autoencoder = load_autoencoder(model, device=device, dtype=dtype)
        for (one, indices), drawn in zip(some, latents, strict=True):
            _save_missing(one, indices, decode_latents(autoencoder, drawn))
        del autoencoder
        environment.release_memory(device)


def load_frozen_unet(
    config: Config, model: ModelFolder, device: torch.device, dtype: torch.dtype
) -> UNet2DConditionModel:
    """Load the UNet that draws class images; in 8 or 4 bits where a LoRA run has its frozen weights so."""
    if config.lora.base_weights == "int8" or config.lora.base_weights == "nf4":
        unet = load_unet(model, device if device.type == "meta" else CPU, dtype)
        quantize([unet], config.lora.base_weights, dtype)
        nn.Module.to(unet, device)
        return unet
    return load_unet(model, device, dtype)


def _save_missing(one: _Set, indices: Sequence[int], pixels: Float[Tensor, "b 3 h w"]) -> None:
    missing = one.missing()
    for index, image in zip(indices, to_images(pixels), strict=True):
        if index in missing:
            write_file(_image_file(one.folder, index), lambda path, image=image: image.save(path, format="PNG"))


def draw_latents(
    config: Config,
    model: ModelFolder,
    unet: UNet2DConditionModel,
    indices: Sequence[int],
    conditioning: Conditioning,
    size: Size,
) -> Float[Tensor, "b c x y"]:
    """Return the latents of the class images of some numbers, on the host.

    Args:
        config: The configuration.
        model: Where the noise schedule is.
        unet: The frozen UNet.
        indices: Numbers of the images; each has its own noise.
        conditioning: A row for the class prompt and one for the empty prompt, with embeddings.
        size: Height and width in pixels.
    """
    height, width = size
    latent_pixel = downscaling(model.config_of("vae"))
    stream = "class_images" if height == width else f"class_images {width}x{height}"
    return sample_prompt(
        Denoiser(unet, None),
        load_noise_schedule(model),
        _settings(config),
        replace(conditioning, time_ids=whole_picture_time_ids(height, width, 2)),
        latent_size=(height // latent_pixel, width // latent_pixel),
        generators=[generator(config.seed, stream, index) for index in indices],
    ).to(CPU if unet.device.type == "cuda" else unet.device)


def _embed(config: Config, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> Conditioning:
    """Return a row for the class prompt and one for the empty prompt."""
    prompts = [str(config.subject.class_prompt), ""]
    text_encoders = load_text_encoders(model, device=device, dtype=dtype)
    embedded = text_encoders.embed(tokenize_prompts(model, prompts))
    table = PromptTable.of(prompts, embedded, zeroes_empty_prompt=model.zeroes_empty_prompt)
    return table.conditioning(prompts)


def _whole_batches(missing: Iterable[int], size: int) -> list[list[int]]:
    """Return the batches of consecutive images that hold a missing one.

    Batches are always drawn whole, because the last bits of an image depend on the size of its batch.
    """
    firsts = sorted({index - index % size for index in missing})
    return [list(range(first, first + size)) for first in firsts]


def _image_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"
