"""Pictures to latents and back, in the denoiser's scale, for every autoencoder."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from lowmem_db.models.loading import Autoencoder


@torch.no_grad()
def encode_moments(
    autoencoder: Autoencoder, pixels: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, "b c x y"], Float[Tensor, "b c x y"]]:
    """Return mean and standard deviation of the latents' posterior, times the autoencoder's scaling factor.

    A deterministic autoencoder has the standard deviation zero.

    Args:
        autoencoder: Computes in its own type.
        pixels: Values in [-1, 1].
    """
    encoded: Any = autoencoder.encode(pixels.to(autoencoder.device, autoencoder.dtype))
    scale = scaling_factor(autoencoder)
    if hasattr(encoded, "latent_dist"):
        return (encoded.latent_dist.mean * scale).float(), (encoded.latent_dist.std * scale).float()
    mean = (encoded.latents * scale).float()
    return mean, torch.zeros_like(mean)


@torch.no_grad()
def decode_latents(autoencoder: Autoencoder, latents: Float[Tensor, "b c x y"]) -> Float[Tensor, "b 3 h w"]:
    """Return pictures in [-1, 1]; decoded one at a time, which bounds the memory by one picture."""
    decode: Any = autoencoder.decode
    scaled = latents.to(autoencoder.device, autoencoder.dtype) / scaling_factor(autoencoder)
    return torch.cat([decode(latent[None]).sample for latent in scaled]).float().clamp(-1, 1)


def decode_in_tiles(autoencoder: Autoencoder, *, num_pixels: int) -> None:
    """Let an autoencoder decode squares of half a picture's side, which overlap by a quarter and are blended.

    Only ``AutoencoderKL`` has tiles; the others are small.

    Args:
        autoencoder: Changed in place.
        num_pixels: Side of the pictures.
    """
    if isinstance(autoencoder, AutoencoderKL):
        autoencoder.enable_tiling()
        autoencoder.tile_sample_min_size = num_pixels // 2
        autoencoder.tile_latent_min_size = num_pixels // 2 // downscaling(dict(autoencoder.config))


def scaling_factor(autoencoder: Autoencoder) -> float:
    """Return what latents are multiplied by before the denoiser sees them."""
    return autoencoder.config.get("scaling_factor", 1.0)


def downscaling(autoencoder_config: dict) -> int:
    """Return how many pixels one latent pixel stands for, along one side."""
    return 2 ** (len(autoencoder_config["block_out_channels"]) - 1)
