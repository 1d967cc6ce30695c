"""Samples during training, from the model in memory; the autoencoder is loaded for them and freed again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.data.batches import PromptTable
from lowmem_db.models.conditioning import whole_picture_time_ids
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.latents import decode_in_tiles, decode_latents, downscaling
from lowmem_db.models.loading import Autoencoder, load_autoencoder, load_noise_schedule
from lowmem_db.models.source import ModelFolder
from lowmem_db.randomness import generator
from lowmem_db.records import Conditioning
from lowmem_db.sampling.images import GRID_FILE, save_rows, to_images
from lowmem_db.sampling.latents import SamplingSettings, sample_latents
from lowmem_db.storage.atomic import write_folder
from lowmem_db.storage.run_folder import RunFolder


def draw_samples(
    config: Config, model: ModelFolder, denoiser: Denoiser, prompts: PromptTable, run: RunFolder, step: int
) -> None:
    """Draw ``sampling.num_images`` of each of ``sampling.prompts`` into ``samples/step-N/``, with a grid of all."""
    rows = draw_images(config, model, denoiser, prompts, config.sampling.prompts)
    folder = run.samples_dir(step)
    write_folder(folder, lambda temporary: save_rows(temporary, rows))
    say(f"samples of step {step}: {folder / GRID_FILE}")


def draw_images(
    config: Config, model: ModelFolder, denoiser: Denoiser, table: PromptTable, prompts: Sequence[str]
) -> list[tuple[str, list[Image]]]:
    """Draw ``sampling.num_images`` of each of some prompts; return each prompt with its images."""
    latents = [sample_prompt(config, model, denoiser, table.conditioning([prompt, ""])) for prompt in prompts]
    autoencoder = load_decoder(config, model, denoiser)
    images = [to_images(decode_latents(autoencoder, drawn)) for drawn in latents]
    return list(zip(prompts, images, strict=True))


def sample_prompt(
    config: Config, model: ModelFolder, denoiser: Denoiser, conditioning: Conditioning
) -> Float[Tensor, "b c h w"]:
    """Draw the latents of the samples of one prompt.

    Args:
        config: The configuration.
        model: Where the noise schedule is.
        denoiser: The model in memory.
        conditioning: A row for the prompt and one for the empty prompt.
    """
    count = config.sampling.num_images
    at_once = 1 if config.memory.tiled_samples else count
    settings = SamplingSettings(
        sampler=config.sampling.sampler,
        num_inference_steps=config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
    )
    resolution = config.data.resolution
    conditioning = replace(conditioning, time_ids=whole_picture_time_ids(resolution, resolution, 2))
    objective = config.objective
    noise_schedule = load_noise_schedule(model, objective.prediction_type, objective.zero_terminal_snr)
    with torch.no_grad(), _evaluating(denoiser):
        embeds, added = denoiser.embeds_and_added(conditioning)
        drawn = [
            sample_latents(
                denoiser.unet,
                noise_schedule,
                settings,
                prompt_embeds=embeds[:1].expand(at_once, -1, -1),
                empty_embeds=embeds[1:],
                latent_size=config.data.resolution // downscaling(model.config_of("vae")),
                generators=[generator(config.sampling.seed, "samples", first + index) for index in range(at_once)],
                added_cond_kwargs=added,
            )
            for first in range(0, count, at_once)
        ]
    return torch.cat(drawn)


def load_decoder(config: Config, model: ModelFolder, denoiser: Denoiser) -> Autoencoder:
    """Load what decodes samples: in fp32 or, for tiled samples, in tiles and the type of the weights.

    An autoencoder that has to compute in fp32 does so in tiles too.
    """
    if not config.memory.tiled_samples:
        return load_autoencoder(model, device=denoiser.device)
    autoencoder = load_autoencoder(model, device=denoiser.device, dtype=denoiser.unet.dtype)
    decode_in_tiles(autoencoder, num_pixels=config.data.resolution)
    return autoencoder


@contextmanager
def _evaluating(denoiser: Denoiser) -> Iterator[None]:
    """Put what trains into evaluation mode, and back."""
    modules: list[nn.Module] = list(denoiser.modules().values())
    for module in modules:
        module.eval()
    try:
        with denoiser.autocast():
            yield
    finally:
        for module in modules:
            module.train()
