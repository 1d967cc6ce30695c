"""Images of prompts from a model on disk: a run, a folder, or a hub id. One component is in memory at a time."""

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image

from lowmem_db.engine.draw import Artist, Job, draw, loaded_for_use
from lowmem_db.engine.source import ImageSource
from lowmem_db.errors import DataError
from lowmem_db.randomness import generator
from lowmem_db.sampling.latents import SamplingSettings


def generate_images(
    source: ImageSource,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    num_images: int,
    resolution: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[tuple[str, list[Image.Image]]]:
    """Draw ``num_images`` of each prompt.

    Image ``i`` of a prompt starts from the same noise whatever the prompt, so that prompts can be compared.

    Args:
        source: What to draw from.
        prompts: What to draw.
        settings: Sampler, steps and guidance.
        num_images: Images of each prompt.
        resolution: Pixels of a side.
        seed: Seed of the noise.
        device: Where to compute.
        dtype: Type to compute in.

    Raises:
        DataError: The resolution is no whole number of latent pixels.
    """
    check_resolution(source, resolution)
    table = source.embed([*prompts, ""], device, dtype)
    artist = Artist(model=source.model, settings=settings, objective=source.objective)
    jobs = [
        Job(
            prompts=[prompt],
            size=(resolution, resolution),
            generators=[generator(seed, "samples", index) for index in range(num_images)],
        )
        for prompt in prompts
    ]
    denoiser = loaded_for_use(partial(source.load_denoiser, device, dtype), device)
    codec = loaded_for_use(partial(source.model.space.load, device), device)
    return list(zip(prompts, draw(artist, table, jobs, denoiser, codec, progress="drawing prompts"), strict=True))


def check_resolution(source: ImageSource, resolution: int) -> None:
    """Refuse a resolution that the model cannot draw.

    Raises:
        DataError: It is no whole number of latent pixels.
    """
    cell = source.model.space.cell
    if resolution % cell:
        raise DataError(f"--resolution: {resolution} is not a multiple of {cell}, the size of a latent pixel")
