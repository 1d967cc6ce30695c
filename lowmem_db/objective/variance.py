"""The variational lower bound of a predicted variance (Nichol and Dhariwal 2021, arXiv:2102.09672)."""

import math

import torch
from jaxtyping import Float, Int
from lowmem_db_kernels import DiffusionLoss
from torch import Tensor

from lowmem_db.errors import ConfigError
from lowmem_db.objective.process import Diffusion, NoiseProcess

_HALF_A_LEVEL = 1 / 255
_EDGE = 0.999
_LEAST_PROBABILITY = 1e-12


class VariationalBound:
    """L_vlb of Eq. 4 to 6 for one timestep of each sample, times the number of timesteps, as an estimate of the sum.

    The variance is exp(v log beta_t + (1 - v) log beta~_t) (Eq. 15), where the model's output in [-1, 1] says v in
    [0, 1]. The mean is a given: the bound trains the variance alone.

    Args:
        process: The noise process.
        device: Device of the tables.

    Raises:
        ConfigError: The model predicts no noise, to which these formulas belong.
    """

    def __init__(self, process: NoiseProcess, device: torch.device) -> None:
        if not isinstance(process, Diffusion) or process.prediction_type != "epsilon":
            raise ConfigError(
                "objective.variance: 'hybrid' needs a diffusion model that predicts the noise (epsilon), which this "
                "one does not; set objective.variance=frozen"
            )
        total = process.alphas_cumprod.double()  # alpha-bar of the paper
        before = torch.cat([torch.ones(1, dtype=torch.float64), total[:-1]])
        betas = 1 - total / before
        posterior = betas * (1 - before) / (1 - total)  # beta~ of Eq. 9
        posterior[0] = posterior[1]  # it is 0, and has no logarithm
        self._log_beta, self._log_posterior = betas.log().float().to(device), posterior.log().float().to(device)
        # The means of the posterior and of the model differ as their noises do, times this (Eq. 13).
        self._per_noise = (betas / ((1 - betas).sqrt() * (1 - total).sqrt())).float().to(device)
        self._alpha, self._sigma = (each.float().to(device) for each in (total.sqrt(), (1 - total).sqrt()))

    def __call__(
        self,
        predicted: Float[Tensor, "b c h w"],
        output: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        noisy: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
    ) -> Float[Tensor, " b"]:
        """Return the bound of each sample, in nats for each value of a picture.

        Args:
            predicted: The noise that the model predicts.
            output: What it predicts of the variance.
            noise: The noise in the pictures.
            noisy: The pictures with noise.
            timesteps: Their timesteps.
        """
        error = noise - predicted.detach()
        share = (output + 1) / 2
        log_posterior = _rows(self._log_posterior, timesteps)
        log_variance = share * _rows(self._log_beta, timesteps) + (1 - share) * log_posterior
        distance = _rows(self._per_noise, timesteps) * error
        divergence = 0.5 * (
            log_variance
            - log_posterior
            - 1
            + (log_posterior - log_variance).exp()
            + distance**2 * (-log_variance).exp()
        )
        alpha, sigma = _rows(self._alpha, timesteps), _rows(self._sigma, timesteps)
        clean = (noisy - sigma * noise) / alpha
        decoded = -log_probability(clean, clean + sigma / alpha * error, 0.5 * log_variance)
        terms = torch.where(timesteps.view(-1, 1, 1, 1) == 0, decoded, divergence)
        return len(self._alpha) * terms.mean(dim=(1, 2, 3))


def log_probability(
    pixels: Float[Tensor, "b c h w"], means: Float[Tensor, "b c h w"], log_stds: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Return the logarithm of a Gaussian's probability of each 8-bit value in [-1, 1] (arXiv:2006.11239, Eq. 13)."""

    def below(edge: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf((edge - means) * (-log_stds).exp() / math.sqrt(2)))

    upper = torch.where(pixels > _EDGE, torch.ones_like(pixels), below(pixels + _HALF_A_LEVEL))
    lower = torch.where(pixels < -_EDGE, torch.zeros_like(pixels), below(pixels - _HALF_A_LEVEL))
    return (upper - lower).clamp(min=_LEAST_PROBABILITY).log()


def with_bound(
    loss: DiffusionLoss, bound: Float[Tensor, " b"], *, num_instance: int, prior_loss_weight: float
) -> DiffusionLoss:
    """Return the hybrid loss: the loss and a weighted bound of each sample, averaged as in Equation 2 of DreamBooth."""
    zero = bound.new_zeros(())
    instance = bound[:num_instance].mean() if num_instance else zero
    prior = bound[num_instance:].mean() if num_instance < len(bound) else zero
    total = instance + prior_loss_weight * prior
    with torch.no_grad():
        added = torch.cat([torch.stack([total, instance, prior, zero]), bound])
        packed = loss.packed + added
        packed[3] = loss.finite * bound.isfinite().all()
    return DiffusionLoss(packed=packed, total=loss.total + total)


def _rows(table: Float[Tensor, " t"], timesteps: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return table[timesteps].view(-1, 1, 1, 1)
