"""Drawing prompts with a model on disk: a run, a folder, or a hub id. One component is in memory at a time."""

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image

from lowmem_db.engine.draw import Artist, Job, draw, loaded_for_use
from lowmem_db.engine.fitting import too_many_steps
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
    """Draw ``num_images`` images of each prompt.

    Image ``i`` starts from the same noise for every prompt, so that prompts can be compared.

    Args:
        source: The model to draw from.
        prompts: The prompts to draw.
        settings: Sampler, steps and guidance.
        num_images: Number of images of each prompt.
        resolution: Height and width in pixels.
        seed: Seed of the noise.
        device: Device to compute on.
        dtype: Type to compute in.

    Raises:
        DataError: The resolution is not a multiple of the size of a latent pixel, or there are more sampling steps than
            the model's noise schedule has.
        ConfigError: The model predicts epsilon and its last timestep is pure noise.
    """
    check_resolution(source, resolution)
    steps = settings.num_inference_steps
    if problem := too_many_steps("--num-inference-steps", source.model, settings.sampler, steps, source.objective):
        raise DataError(problem)
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
        DataError: It is not a multiple of the size of a latent pixel.
    """
    cell = source.model.space.cell
    if resolution % cell:
        raise DataError(f"--resolution: {resolution} is not a multiple of {cell}, the size of a latent pixel")
