"""From conditioning to latents: the sampling loop with classifier-free guidance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from lowmem_db.config.schema import Sampler as SamplerName
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.base import Sampler
from lowmem_db.records import Conditioning

_LEARNED_VARIANCES = ("learned", "learned_range")  # of diffusers' ancestral sampler


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How images are drawn.

    Attributes:
        sampler: ``ddpm`` (ancestral, arXiv:2006.11239), ``ddim`` (arXiv:2010.02502), ``dpm_solver`` (arXiv:2211.01095).
        num_inference_steps: Evaluations of the denoiser for each image.
        guidance_scale: Weight of the prompt against the empty prompt (arXiv:2207.12598, Eq. 6 with w = scale - 1).
    """

    sampler: SamplerName
    num_inference_steps: int
    guidance_scale: float


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    sampler: Sampler,
    settings: SamplingSettings,
    told: Conditioning,
    *,
    shape: tuple[int, int, int],
    generators: Sequence[torch.Generator],
    tell: Callable[[Sequence[torch.Generator]], Mapping[str, Tensor]] | None = None,
) -> Float[Tensor, "b c x y"]:
    """Draw the latents of one image for each generator.

    Args:
        denoiser: The denoiser; its mode is not changed.
        sampler: A new sampler of the model's family.
        settings: Steps and guidance.
        told: From :meth:`Denoiser.told`: one row for the prompt of all images or one for each of them, and a row for
            the empty prompt at the end.
        shape: Channels, height and width of an image, in the space of the denoiser.
        generators: One CPU generator for each image, so that an image does not depend on the rest of its batch.
        tell: Returns further conditioning, a row for each image, given the generators after the first noise is drawn.
    """
    on_meta = denoiser.device.type == "meta"
    sampler.set_timesteps(settings.num_inference_steps, device="cpu" if on_meta else denoiser.device)
    guided = _without_and_with_prompt(told, len(generators))
    shape_of_all, channels = (len(generators), *shape), shape[0]
    uses_variance = vars(sampler).get("variance_type") in _LEARNED_VARIANCES
    latents = randn_tensor(shape_of_all, generator=list(generators), device=denoiser.device, dtype=torch.float32)
    if tell is not None:
        rows = {name: row.to(denoiser.device) for name, row in tell(generators).items()}
        both = {name: torch.cat([row, row]) for name, row in rows.items()}
        guided = replace(guided, picture={**guided.picture, **both})
    for timestep in sampler.timesteps:
        inputs = torch.cat([latents, latents]).to(denoiser.dtype)
        predicted = denoiser.family.predict_to_draw(denoiser.module, inputs, timestep, guided)
        prediction = _guided(predicted.float(), settings.guidance_scale, channels, with_variance=uses_variance)
        latents = sampler.step(prediction, timestep, latents, generator=list(generators), return_dict=False)[0]
    return latents


def _guided(
    predicted: Float[Tensor, "b d h w"], scale: float, channels: int, *, with_variance: bool
) -> Float[Tensor, "half e h w"]:
    """Return the guided prediction, then the variance that was predicted with the prompt if the sampler uses it."""
    empty, prompted = predicted.chunk(2)
    prediction = empty[:, :channels] + scale * (prompted[:, :channels] - empty[:, :channels])
    return torch.cat([prediction, prompted[:, channels:]], dim=1) if with_variance else prediction


def _without_and_with_prompt(told: Conditioning, count: int) -> Conditioning:
    """Return a row for each image with the empty prompt, then a row for each with its prompt."""

    def rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            size = (count, *tensor.shape[1:])
            found[name] = torch.cat([tensor[-1:].expand(size), tensor[:-1].expand(size)])
        return found

    return replace(told, tokens={}, embeds=rows(told.embeds), picture=rows(told.picture), has_prompt=None)
