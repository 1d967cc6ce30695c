"""Class images for prior preservation, drawn from the frozen model (arXiv:2208.12242, section 3.3).

A manifest beside the images records what they were drawn with. They are used again only where it matches, topped up
deterministically, and a killed run goes on with the next missing image. A folder without a manifest that holds pictures
belongs to the user and is used as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowmem_db import fingerprint
from lowmem_db.config.schema import Config
from lowmem_db.console import say, track
from lowmem_db.errors import DataError
from lowmem_db.models.conditioning import embed_prompts
from lowmem_db.models.latents import decode_latents, downscaling
from lowmem_db.models.loading import (
    Autoencoder,
    UNet2DConditionModel,
    load_autoencoder,
    load_noise_schedule,
    load_text_encoder,
    load_tokenizer,
    load_unet,
)
from lowmem_db.models.saving import DTYPES
from lowmem_db.models.source import COMPONENTS, ModelFolder
from lowmem_db.randomness import generator
from lowmem_db.sampling.images import to_images
from lowmem_db.sampling.latents import SamplingSettings, sample_latents
from lowmem_db.storage.atomic import write_file
from lowmem_db.storage.run_folder import read_json, write_json

MANIFEST = "manifest.json"
_FORMAT_VERSION = 1


def prepare_class_images(config: Config, model: ModelFolder, device: torch.device) -> Path:
    """See to it that the class images are there; return their folder.

    Raises:
        DataError: The folder holds class images of another model, prompt or sampler.
    """
    wanted = _manifest(config, model, device)
    folder = config.prior.class_dir or config.cache_dir / "class_images" / fingerprint.of_values(wanted)
    if _is_users_own(folder):
        say(f"class images: the pictures in {folder} are used as they are")
        return folder
    _check_manifest(folder, wanted)
    missing = [index for index in range(config.prior.num_class_images) if not _image_file(folder, index).is_file()]
    if not missing:
        say(f"class images: all {config.prior.num_class_images} are there, in {folder}")
        return folder
    say(f"class images: drawing {len(missing)} of {config.prior.num_class_images} into {folder}")
    write_json(folder / MANIFEST, wanted)
    _draw(config, model, device, folder, missing)
    return folder


def class_image_files(config: Config, folder: Path) -> list[Path] | None:
    """Return the drawn images that the configuration asks for, or None where the folder is the user's own."""
    if not (folder / MANIFEST).is_file():
        return None
    return [_image_file(folder, index) for index in range(config.prior.num_class_images)]


def _manifest(config: Config, model: ModelFolder, device: torch.device) -> dict[str, Any]:
    precision = config.prior.precision or ("fp16" if device.type == "cuda" else "fp32")
    return {
        "format_version": _FORMAT_VERSION,
        "model": model.content_key(*COMPONENTS),
        "prompt": config.subject.class_prompt,
        **asdict(_settings(config)),
        "resolution": config.data.resolution,
        "precision": precision,
        "sample_batch_size": config.prior.sample_batch_size,
        "seed": config.seed,
    }


def _settings(config: Config) -> SamplingSettings:
    return SamplingSettings(
        sampler=config.prior.sampler,
        num_inference_steps=config.prior.num_inference_steps,
        guidance_scale=config.prior.guidance_scale,
    )


def _is_users_own(folder: Path) -> bool:
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return False
    return any(not file.name.startswith(".") for file in folder.iterdir())


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


def _draw(config: Config, model: ModelFolder, device: torch.device, folder: Path, missing: list[int]) -> None:
    dtype = DTYPES[_manifest_precision(folder)]
    prompt_embeds, empty_embeds = _embed(model, device, dtype, str(config.subject.class_prompt))
    unet = load_unet(model, device=device, dtype=dtype)
    autoencoder = load_autoencoder(model, device=device, dtype=dtype)
    batches = _whole_batches(missing, config.prior.sample_batch_size)
    for indices in track(batches, "class images", len(batches)):
        pixels = draw_batch(
            config, model, unet, autoencoder, indices, prompt_embeds=prompt_embeds, empty_embeds=empty_embeds
        )
        for index, image in zip(indices, to_images(pixels), strict=True):
            if index in missing:
                write_file(_image_file(folder, index), lambda path, image=image: image.save(path, format="PNG"))


def draw_batch(
    config: Config,
    model: ModelFolder,
    unet: UNet2DConditionModel,
    autoencoder: Autoencoder,
    indices: Sequence[int],
    *,
    prompt_embeds: Float[Tensor, "1 tokens dim"],
    empty_embeds: Float[Tensor, "1 tokens dim"],
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "b 3 h w"]:
    """Return the class images of some numbers, in [-1, 1].

    Args:
        config: The configuration.
        model: Where the noise schedule is.
        unet: The frozen UNet.
        autoencoder: The autoencoder.
        indices: Numbers of the images; each has its own noise.
        prompt_embeds: Embedding of the class prompt.
        empty_embeds: Embedding of the empty prompt.
        added_cond_kwargs: As for :func:`lowmem_db.sampling.latents.sample_latents`.
    """
    latents = sample_latents(
        unet,
        load_noise_schedule(model),
        _settings(config),
        prompt_embeds=prompt_embeds.expand(len(indices), -1, -1),
        empty_embeds=empty_embeds,
        latent_size=config.data.resolution // downscaling(model.config_of("vae")),
        generators=[generator(config.seed, "class_images", index) for index in indices],
        added_cond_kwargs=added_cond_kwargs,
    )
    return decode_latents(autoencoder, latents)


def _manifest_precision(folder: Path) -> str:
    return read_json(folder / MANIFEST)["precision"]  # type: ignore[index]


def _embed(
    model: ModelFolder, device: torch.device, dtype: torch.dtype, prompt: str
) -> tuple[torch.Tensor, torch.Tensor]:
    text_encoder = load_text_encoder(model, device=device, dtype=dtype)
    return tuple(embed_prompts(load_tokenizer(model), text_encoder, [prompt, ""]).split(1))  # type: ignore[return-value]


def _whole_batches(missing: Iterable[int], size: int) -> list[list[int]]:
    """Return the batches of consecutive images that hold a missing one.

    Batches are always drawn whole, because the last bits of an image depend on the size of its batch.
    """
    firsts = sorted({index - index % size for index in missing})
    return [list(range(first, first + size)) for first in firsts]


def _image_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"
