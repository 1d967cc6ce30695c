"""The low-resolution pictures that a super-resolution model enlarges, and the noise on them.

Noise augmentation (arXiv:2106.15282, section 4) lets a model tolerate the mistakes of the stage before it. Much of it
costs fidelity to the subject, so the DreamBooth paper lowers it from 1e-3 to 1e-5 for the fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from lowmem_db.randomness import generator
from lowmem_db.records import Batch, Conditioning

STREAM = "low_resolution"
_LEVELS = 127.5  # grey levels per unit, of 8-bit pictures in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class LowResolution:
    """Tells a model the low-resolution versions of the pictures that it shall draw.

    Attributes:
        resolution: Their height and width in pixels.
        variance: Variance of the noise on them, in their scale of [-1, 1].
        level: The number by which the model knows that variance.
        seed: The run's seed.
    """

    resolution: int
    variance: float
    level: int
    seed: int = 0

    def __call__(self, batch: Batch, step: int, device: torch.device) -> Conditioning:
        """Return the conditioning of a batch of pictures, with their low-resolution versions.

        The noise is a function of (seed, step, sample), in a stream of its own.
        """
        pixels = batch.latent_mean.to(device)
        generators = [generator(self.seed, STREAM, step, sample) for sample in batch.sample_ids.tolist()]
        small = reduced(pixels, self.resolution)
        told = self.told(small, (pixels.shape[-2], pixels.shape[-1]), generators)
        return replace(batch.conditioning, picture={**batch.conditioning.picture, **told})

    def told(
        self, small: Float[Tensor, "b 3 h w"], size: tuple[int, int], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Return what a model is told of low-resolution pictures: them, enlarged and with noise, and its level.

        Args:
            small: The pictures in [-1, 1].
            size: Height and width of the pictures to draw.
            generators: One on the CPU for each of them.
        """
        large = enlarged(small, size)
        noise = torch.stack([torch.randn(large.shape[1:], generator=each) for each in generators]).to(large.device)
        noisy = (1 - self.variance) ** 0.5 * large + self.variance**0.5 * noise
        return {"low_resolution": noisy, "noise_level": torch.full((len(small),), float(self.level))}


def reduced(pixels: Float[Tensor, "b 3 h w"], resolution: int) -> Float[Tensor, "b 3 s s"]:
    """Return square pictures in [-1, 1] at another resolution, antialiased and rounded to 8 bits as files hold them."""
    small = interpolate(pixels, size=(resolution, resolution), mode="bicubic", antialias=True).clamp(-1, 1)
    return ((small + 1) * _LEVELS).round() / _LEVELS - 1


def enlarged(small: Float[Tensor, "b 3 s t"], size: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """Return pictures at the size that is drawn, as diffusers' pipeline enlarges them."""
    return interpolate(small, size=size, mode="bilinear", align_corners=True)


def level_of(variance: float, alphas_cumprod: Float[Tensor, " t"]) -> int:
    """Return the step of a noise schedule whose variance 1 - alphas_cumprod is nearest to another one."""
    return int((1 - alphas_cumprod.double() - variance).abs().argmin())
