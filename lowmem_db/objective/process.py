"""Noise processes as data: how timesteps are drawn, and four coefficients per sample for noisy latents and target.

Timesteps are those that the model gets as input, in the units of its ``num_train_timesteps``.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Real
from lowmem_db_kernels import NoiseCoefficients
from torch import Tensor

from lowmem_db.errors import ConfigError
from lowmem_db.objective.weights import timestep_weights

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
Weighting = Callable[[Tensor], Tensor]


@runtime_checkable
class NoiseProcess(Protocol):
    """How latents turn into noise, and what the model predicts."""

    def to(self, device: torch.device) -> "NoiseProcess":
        """Return the process with its tables on a device."""
        ...

    def draw(self, generator: torch.Generator) -> Real[Tensor, ""]:
        """Draw one timestep, on the CPU."""
        ...

    def coefficients(self, timesteps: Real[Tensor, " b"]) -> NoiseCoefficients:
        """Return the coefficients of latents and noise at each timestep, on the process's device."""
        ...

    def weighting(self, *, snr_gamma: float | None, debiased: bool) -> Weighting:
        """Return a function from timesteps ``(b,)`` to the fp32 weights of their losses, ``(b,)``.

        Args:
            snr_gamma: See :func:`timestep_weights`.
            debiased: See there.

        Raises:
            ConfigError: The process does not support such weights, or one of them is infinite.
        """
        ...


class Diffusion:
    """A variance-preserving diffusion in discrete steps (arXiv:2006.11239, Eq. 4).

    With a = sqrt(alphas_cumprod) and s = sqrt(1 - alphas_cumprod), the noisy latents are a x + s e; the target is the
    noise e (``epsilon``), the velocity a e - s x (``v_prediction``, arXiv:2202.00512) or the latents x (``sample``).

    Args:
        alphas_cumprod: The noise schedule, shape ``(t,)``.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        device: Device of the tables.

    Raises:
        ConfigError: The prediction type is unknown.
    """

    def __init__(
        self,
        alphas_cumprod: Float[Tensor, " t"],
        prediction_type: str,
        *,
        device: torch.device | None = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"objective.prediction_type: {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}; set the one "
                "that the model was trained with"
            )
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type
        # In float64, because the subtraction in sqrt(1 - alphas_cumprod) cancels.
        exact = alphas_cumprod.double()
        self.alphas = exact.sqrt().float().to(device)
        self.sigmas = (1.0 - exact).sqrt().float().to(device)

    def to(self, device: torch.device) -> "Diffusion":
        """Return the process with its tables on a device."""
        return Diffusion(self.alphas_cumprod, self.prediction_type, device=device)

    def draw(self, generator: torch.Generator) -> Int[Tensor, ""]:
        """Draw one of the steps, uniformly."""
        return torch.randint(len(self.alphas_cumprod), (), generator=generator)

    def coefficients(self, timesteps: Int[Tensor, " b"]) -> NoiseCoefficients:
        """Return the coefficients of each timestep."""
        alpha, sigma = self.alphas[timesteps], self.sigmas[timesteps]
        if self.prediction_type == "v_prediction":
            return NoiseCoefficients(alpha, sigma, -sigma, alpha)
        zeros, ones = torch.zeros_like(alpha), torch.ones_like(alpha)
        target = (zeros, ones) if self.prediction_type == "epsilon" else (ones, zeros)
        return NoiseCoefficients(alpha, sigma, *target)

    def weighting(self, *, snr_gamma: float | None, debiased: bool) -> Weighting:
        """Return the weights of :func:`timestep_weights`, which depend on the signal-to-noise ratio."""
        table = timestep_weights(
            self.alphas_cumprod, self.prediction_type, snr_gamma=snr_gamma, debiased=debiased
        ).to(self.alphas.device)  # fmt: skip
        return lambda timesteps: table[timesteps]


class Flow:
    """A rectified flow: a straight line from latents to noise, whose direction the model predicts.

    With sigma = timestep / num_train_timesteps in [0, 1], the noisy latents are (1 - sigma) x + sigma e and the target
    is e - x (arXiv:2209.03003, Eq. 1; the conditional flow matching of arXiv:2210.02747, section 4.1, without its
    smallest sigma). All weights are 1: the distribution of the timesteps says which of them matter.

    Args:
        shift: Moves sigmas towards the noise, sigma -> shift sigma / (1 + (shift - 1) sigma), which large images need
            (arXiv:2403.03206, section 5.3.2); 1 is no shift, 3 is Stable Diffusion 3's.
        timesteps: Distribution of sigma before the shift: ``uniform``, or ``logit_normal``, the sigmoid of a normal
            number (arXiv:2403.03206, section 3.1), which favours the middle.
        logit_mean: Mean of the normal number.
        logit_std: Its standard deviation.
        num_train_timesteps: The timestep at sigma 1.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        shift: float = 1.0,
        timesteps: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        if timesteps not in ("uniform", "logit_normal"):
            raise ValueError(f"timesteps={timesteps!r} is not one of uniform, logit_normal")
        for name, value in (("shift", shift), ("logit_std", logit_std), ("num_train_timesteps", num_train_timesteps)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        self.shift = shift
        self.timesteps = timesteps
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.num_train_timesteps = num_train_timesteps

    def to(self, device: torch.device) -> "Flow":
        """Return the process itself: it has no tables."""
        return self

    def draw(self, generator: torch.Generator) -> Float[Tensor, ""]:
        """Draw a timestep in [0, ``num_train_timesteps``]."""
        if self.timesteps == "uniform":
            sigma = torch.rand((), generator=generator)
        else:
            sigma = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((), generator=generator))
        return self.num_train_timesteps * (self.shift * sigma / (1 + (self.shift - 1) * sigma))

    def coefficients(self, timesteps: Float[Tensor, " b"]) -> NoiseCoefficients:
        """Return the coefficients of each timestep."""
        sigma = timesteps.float() / self.num_train_timesteps
        ones = torch.ones_like(sigma)
        return NoiseCoefficients(1 - sigma, sigma, -ones, ones)

    def weighting(self, *, snr_gamma: float | None, debiased: bool) -> Weighting:
        """Return weights of 1.

        Raises:
            ConfigError: The weights depend on the signal-to-noise ratio.
        """
        for field, is_set in (("snr_gamma", snr_gamma is not None), ("debiased", debiased)):
            if is_set:
                raise ConfigError(
                    f"objective.{field}: applies to diffusion models, but this model is trained with flow matching; "
                    "leave it out"
                )
        return lambda timesteps: torch.ones_like(timesteps, dtype=torch.float32)
