"""TAEF2, a tiny autoencoder with factor 8 and 32 latent channels, as a diffusers module."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class TinyBlock(nn.Module):
    """Residual block of three convolutions, optionally after a group-normalised 1x1 bottleneck (the mid block).

    The bottleneck's parameters are named `pool`, as in the published checkpoint.
    """

    def __init__(self, width: int, use_group_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        self.pool = None
        if use_group_norm:
            wide = 4 * width
            expand, reduce = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
            self.pool = nn.Sequential(expand, nn.GroupNorm(4, wide), nn.ReLU(), reduce)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps (batch, channels, height, width) features to the same shape."""
        if self.pool is not None:
            hidden = hidden + self.pool(hidden)
        return torch.relu(self.conv(hidden) + hidden)


class SoftClamp(nn.Module):
    """Keeps latents within (-3, 3) smoothly."""

    def forward(self, latents: Tensor) -> Tensor:
        """Returns 3 tanh(latents / 3), same shape."""
        return 3 * torch.tanh(latents / 3)


def build_encoder(latent_channels: int, width: int) -> nn.Sequential:
    """Returns the encoder: images in [0, 1] to raw latents at an eighth of the size."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), TinyBlock(width)]
    for _ in range(3):
        layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [TinyBlock(width) for _ in range(3)]
    layers[-3:] = [TinyBlock(width, use_group_norm=True) for _ in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(width, latent_channels, 3, padding=1))


def build_decoder(latent_channels: int, width: int) -> nn.Sequential:
    """Returns the decoder: raw latents to images in [0, 1] at eight times the size."""
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
    for stage, blocks in enumerate((3, 3, 3, 1)):
        layers += [TinyBlock(width, use_group_norm=stage == 0) for _ in range(blocks)]
        if stage < 3:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))


class AutoencoderTAEF2(ModelMixin, ConfigMixin):
    """Encodes images in [-1, 1] to standardised latents and back.

    Latents are standardised per channel inside the module (mean 0, standard deviation 1 over the training
    pictures), so `scaling_factor` is 1 and the UNet's input needs no further scaling.

    Args:
        latents_mean: Mean of each raw latent channel. Default: zeros.
        latents_std: Standard deviation of each raw latent channel. Default: ones.
        block_out_channels: Four entries, from which pipelines derive the factor 8.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        block_out_channels: Sequence[int] = (64, 64, 64, 64),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(latent_channels, block_out_channels[0])
        self.decoder = build_decoder(latent_channels, block_out_channels[0])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.config["latent_channels"]
        mean = self.config["latents_mean"] or [0.0] * channels
        std = self.config["latents_std"] or [1.0] * channels
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Encodes (batch, 3, height, width) images in [-1, 1] to (batch, 32, height / 8, width / 8) latents."""
        raw = self.encoder((x + 1) / 2)
        mean, std = self._statistics(raw)
        latents = (raw - mean) / std
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self, z: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Decodes standardised latents to images in [-1, 1]; `generator` is accepted for pipelines and unused."""
        mean, std = self._statistics(z)
        sample = self.decoder(z * std + mean).clamp(0, 1) * 2 - 1
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes images in [-1, 1]."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)
