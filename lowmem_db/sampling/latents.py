"""From prompt embeddings to latents: the sampling loop with classifier-free guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from lowmem_db.config.schema import Sampler
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.records import Conditioning

_SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm_solver": DPMSolverMultistepScheduler}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How images are drawn.

    Attributes:
        sampler: ``ddpm`` (ancestral, arXiv:2006.11239), ``ddim`` (arXiv:2010.02502), ``dpm_solver`` (arXiv:2211.01095).
        num_inference_steps: Evaluations of the UNet for each image.
        guidance_scale: Weight of the prompt against the empty prompt (arXiv:2207.12598, Eq. 6 with w = scale - 1).
    """

    sampler: Sampler
    num_inference_steps: int
    guidance_scale: float


@torch.no_grad()
def sample_latents(
    unet: UNet2DConditionModel,
    noise_schedule: DDPMScheduler,
    settings: SamplingSettings,
    *,
    prompt_embeds: Float[Tensor, "b tokens dim"],
    empty_embeds: Float[Tensor, "1 tokens dim"],
    latent_size: int | tuple[int, int],
    generators: Sequence[torch.Generator],
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "b c x y"]:
    """Draw latents, one image for each row of the embeddings.

    Args:
        unet: Predicts in its own type; its mode is not changed.
        noise_schedule: The schedule the model was trained with.
        settings: Sampler, steps and guidance.
        prompt_embeds: What each image shall show.
        empty_embeds: Embedding of the empty prompt.
        latent_size: Latent pixels of a side, or height and width.
        generators: One CPU generator for each image: an image does not depend on those drawn beside it.
        added_cond_kwargs: What SDXL is told beside the embeddings, each with a row for the prompt and one for the empty
            prompt.
    """
    scheduler = _SAMPLERS[settings.sampler].from_config(noise_schedule.config)
    on_meta = unet.device.type == "meta"
    scheduler.set_timesteps(settings.num_inference_steps, device="cpu" if on_meta else unet.device)
    count = len(prompt_embeds)
    embeds = torch.cat([empty_embeds.expand_as(prompt_embeds), prompt_embeds]).to(unet.device, unet.dtype)
    sides = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
    shape = (count, unet.config["in_channels"], *sides)
    added = (
        None
        if added_cond_kwargs is None
        else {
            name: torch.cat([rows[1:].expand(count, -1), rows[:1].expand(count, -1)]).to(unet.device)
            for name, rows in added_cond_kwargs.items()
        }
    )
    latents = randn_tensor(shape, generator=list(generators), device=unet.device, dtype=torch.float32)
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, latents]).to(unet.dtype)
        predicted = unet(inputs, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        empty, prompted = predicted.float().chunk(2)
        prediction = empty + settings.guidance_scale * (prompted - empty)
        latents = scheduler.step(prediction, timestep, latents, generator=list(generators), return_dict=False)[0]
    return latents


def sample_prompt(
    denoiser: Denoiser,
    noise_schedule: DDPMScheduler,
    settings: SamplingSettings,
    conditioning: Conditioning,
    *,
    latent_size: int | tuple[int, int],
    generators: Sequence[torch.Generator],
) -> Float[Tensor, "b c x y"]:
    """Draw latents of one prompt, an image for each generator.

    Args:
        denoiser: Predicts in its own type; its mode is not changed.
        noise_schedule: The schedule the model was trained with.
        settings: Sampler, steps and guidance.
        conditioning: A row for the prompt and one for the empty prompt.
        latent_size: Latent pixels of a side, or height and width.
        generators: As for :func:`sample_latents`.
    """
    with torch.no_grad():
        embeds, added = denoiser.embeds_and_added(conditioning)
    return sample_latents(
        denoiser.unet,
        noise_schedule,
        settings,
        prompt_embeds=embeds[:1].expand(len(generators), -1, -1),
        empty_embeds=embeds[1:],
        latent_size=latent_size,
        generators=generators,
        added_cond_kwargs=added,
    )
