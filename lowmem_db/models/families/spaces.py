"""The space that a denoiser works in: an autoencoder's latents, or pixels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from lowmem_db.errors import NonFiniteError
from lowmem_db.finite import first_not_finite
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.loading import CPU, Autoencoder, load_autoencoder

Moments = tuple[Float[Tensor, "b c x y"], Float[Tensor, "b c x y"]]


@runtime_checkable
class Codec(Protocol):
    """Encodes pictures into the denoiser's space and decodes them; its weights are loaded."""

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Moments:
        """Return the mean and standard deviation of the encodings of pictures in [-1, 1], in the denoiser's scale."""
        ...

    def decode(self, latents: Float[Tensor, "b c x y"]) -> Float[Tensor, "b 3 h w"]:
        """Return pictures in [-1, 1]."""
        ...

    def decode_in_tiles(self, num_pixels: int) -> None:
        """From now on, decode pictures with sides of ``num_pixels`` in tiles if that saves memory."""
        ...

    def encode_in_tiles(self, num_pixels: int) -> None:
        """From now on, encode pictures with sides of ``num_pixels`` in tiles if that saves memory."""
        ...

    def drop_decoder(self) -> None:
        """Free the weights that only decode."""
        ...

    def drop_encoder(self) -> None:
        """Free the weights that only encode."""
        ...


@runtime_checkable
class Space(Protocol):
    """The space that a model works in; only its files are read."""

    @property
    def cell(self) -> int:
        """Pixels per position of the space, along one side."""
        ...

    @property
    def channels(self) -> int:
        """Channels of an encoded picture."""
        ...

    def content_key(self) -> str:
        """Return a key of everything that encoded pictures depend on besides the pictures."""
        ...

    def load(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Codec:
        """Load the codec."""
        ...


@dataclass(frozen=True)
class LatentSpace:
    """The latents of an autoencoder.

    Attributes:
        files: The model.
        component: Folder of the autoencoder.
    """

    files: ModelFiles
    component: str = "vae"

    @property
    def cell(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.files.config_of(self.component)["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.files.config_of(self.component).get("latent_channels", 4)

    def content_key(self) -> str:
        """Return the key of the autoencoder's files."""
        return self.files.content_key(self.component)

    def load(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> "LatentCodec":
        """Load the autoencoder, in ``dtype`` unless it must compute in fp32."""
        folder = self.files.folder_of(self.component)
        return LatentCodec(load_autoencoder(self.files, self.component, device, dtype), self.cell, folder)


@dataclass(frozen=True)
class LatentCodec:
    """A loaded autoencoder; it computes in the type of its weights.

    Attributes:
        autoencoder: One of diffusers' autoencoders, or the demo's.
        cell: Pixels per latent pixel, along one side.
        folder: Where it was loaded from, for messages.
    """

    autoencoder: Autoencoder
    cell: int
    folder: Path = Path("vae")

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Moments:
        """Return the mean and standard deviation of the latents' posterior, times the autoencoder's scaling factor.

        For a deterministic autoencoder the standard deviation is zero.

        Raises:
            NonFiniteError: One of them is infinite or NaN.
        """
        autoencoder, scale = self.autoencoder, self.scaling_factor
        encoded: Any = autoencoder.encode(pixels.to(autoencoder.device, autoencoder.dtype))
        if hasattr(encoded, "latent_dist"):
            mean, std = (encoded.latent_dist.mean * scale).float(), (encoded.latent_dist.std * scale).float()
        else:
            mean = (encoded.latents * scale).float()
            std = torch.zeros_like(mean)
        self._check({"the mean": mean, "the standard deviation": std}, "latents")
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c x y"]) -> Float[Tensor, "b 3 h w"]:
        """Return pictures in [-1, 1], decoded one at a time to save memory.

        Raises:
            NonFiniteError: One has values that are infinite or NaN.
        """
        decode: Any = self.autoencoder.decode
        scaled = latents.to(self.autoencoder.device, self.autoencoder.dtype) / self.scaling_factor
        pictures = torch.cat([decode(latent[None]).sample for latent in scaled]).float()
        self._check({"the picture": pictures}, "pictures")
        return pictures.clamp(-1, 1)

    def decode_in_tiles(self, num_pixels: int) -> None:
        """Decode tiles of half a picture's side, which overlap by a quarter and are blended.

        Only ``AutoencoderKL`` supports tiles; the others are small.
        """
        if isinstance(self.autoencoder, AutoencoderKL):
            self.autoencoder.enable_tiling()
            self.autoencoder.tile_sample_min_size = num_pixels // 2
            self.autoencoder.tile_latent_min_size = num_pixels // 2 // self.cell

    def encode_in_tiles(self, num_pixels: int) -> None:
        """Encode tiles of half a picture's side, as in :meth:`decode_in_tiles`; the latents are blended."""
        self.decode_in_tiles(num_pixels)

    def drop_decoder(self) -> None:
        """Free the weights that only decode, of an ``AutoencoderKL``."""
        if isinstance(self.autoencoder, AutoencoderKL):
            del self.autoencoder.decoder, self.autoencoder.post_quant_conv

    def drop_encoder(self) -> None:
        """Free the weights that only encode, of an ``AutoencoderKL``."""
        if isinstance(self.autoencoder, AutoencoderKL):
            del self.autoencoder.encoder, self.autoencoder.quant_conv

    def _check(self, made: dict[str, Tensor], what: str) -> None:
        """Refuse infinite values and NaN, which would become black pictures, or spoil the training.

        Raises:
            NonFiniteError: There are some.
        """
        if (name := first_not_finite(made)) is not None:
            kind = str(self.autoencoder.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"{self.folder}: the autoencoder gives {what} that are infinite or NaN ({name}, computed in {kind})"
            )

    @property
    def scaling_factor(self) -> float:
        """The factor that latents are multiplied by before the denoiser sees them."""
        return self.autoencoder.config.get("scaling_factor", 1.0)


@dataclass(frozen=True)
class PixelSpace:
    """Pixels in [-1, 1]: nothing is loaded, encoded or decoded."""

    cell: int = 1
    channels: int = 3

    def content_key(self) -> str:
        """Return a constant: nothing else matters."""
        return "pixels"

    def load(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> "PixelCodec":
        """Return the codec that passes pictures through."""
        return PixelCodec(device)


@dataclass(frozen=True)
class PixelCodec:
    """Passes pictures through; their standard deviation is zero."""

    device: torch.device

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Moments:
        """Return the pictures and zeros."""
        mean = pixels.to(self.device, torch.float32)
        return mean, torch.zeros_like(mean)

    def decode(self, latents: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the pictures, clamped to [-1, 1]."""
        return latents.to(self.device, torch.float32).clamp(-1, 1)

    def decode_in_tiles(self, num_pixels: int) -> None:
        """Do nothing: there is nothing to decode."""

    def encode_in_tiles(self, num_pixels: int) -> None:
        """Do nothing: there is nothing to encode."""

    def drop_decoder(self) -> None:
        """Do nothing: there is no decoder."""

    def drop_encoder(self) -> None:
        """Do nothing: there is no encoder."""
