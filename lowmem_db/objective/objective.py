"""DreamBooth's Equation 2 (arXiv:2208.12242) on one batch of instance and prior samples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from lowmem_db_kernels import DiffusionLoss, diffusion_loss, noise
from torch import Tensor

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.objective.process import NoiseProcess
from lowmem_db.objective.variance import VariationalBound, with_bound
from lowmem_db.randomness import generator
from lowmem_db.records import Batch, Conditioning

Tell = Callable[[Batch, int, torch.device], Conditioning]
"""Returns the conditioning of a batch at a step, on a device."""


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """The denoiser's input, and the target of its prediction; both fp32."""

    noisy_latents: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    timesteps: Real[Tensor, " b"]
    num_instance: int


class Objective:
    """Draws noise and timesteps as a function of (seed, step, sample), and computes the loss of a prediction.

    Args:
        config: The section ``objective``.
        process: The noise process of the model.
        prior_loss_weight: Lambda of Equation 2.
        seed: The run's seed.
        device: Device of the model.
        tell: Adds to the conditioning of a batch what the model is told of its pictures. Default: nothing.

    Raises:
        ConfigError: The process does not support the configured weights (see :meth:`NoiseProcess.weighting`) or the
            configured loss of the variance.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        process: NoiseProcess,
        prior_loss_weight: float,
        seed: int,
        device: torch.device,
        tell: Tell | None = None,
    ) -> None:
        self.config = config
        self.process = process.to(device)
        self.prior_loss_weight = prior_loss_weight
        self.seed = seed
        self.device = device
        self._tell = tell
        self._bound = VariationalBound(process, device) if config.variance == "hybrid" else None
        self._weights_of = self.process.weighting(snr_gamma=config.snr_gamma, debiased=config.debiased)

    def timesteps(self, step: int, sample_ids: Int[Tensor, " b"]) -> Real[Tensor, " b"]:
        """Draw a timestep for each sample, independently."""
        draws = [
            self.process.draw(generator(self.seed, "timesteps", step, sample)) for sample in sample_ids.tolist()
        ]  # fmt: skip
        return torch.stack(draws)

    def noise(self, batch: Batch, step: int) -> NoisedBatch:
        """Draw latents, timesteps and noise; return the noisy latents and the target.

        All arithmetic is in fp32, whatever type the model uses.
        """
        timesteps = self.timesteps(step, batch.sample_ids).to(self.device)
        noisy_latents, target = noise(
            batch.latent_mean.to(self.device),
            self.process.coefficients(timesteps),
            std=batch.latent_std.to(self.device),
            seed=self.seed,
            step=step,
            sample_ids=batch.sample_ids.to(self.device),
            noise_offset=self.config.noise_offset,
            input_perturbation=self.config.input_perturbation,
        )
        return NoisedBatch(
            noisy_latents=noisy_latents, target=target, timesteps=timesteps, num_instance=batch.num_instance
        )

    def conditioning(self, batch: Batch, step: int) -> Conditioning:
        """Return what the model is told of a batch: its prompts and, for some models, its pictures."""
        return batch.conditioning if self._tell is None else self._tell(batch, step, self.device)

    def loss(self, prediction: Float[Tensor, "b d h w"], noised: NoisedBatch) -> DiffusionLoss:
        """Return Equation 2: each term is the mean over its own samples, and the gradient flows through ``total``.

        Args:
            prediction: What the denoiser predicts; for the hybrid loss, the variance in further channels.
            noised: What it was given.
        """
        channels = noised.target.shape[1]
        loss = self._simple_loss(prediction[:, :channels] if self._bound else prediction, noised)
        if self._bound is None:
            return loss
        bound = self._bound(
            prediction[:, :channels],
            prediction[:, channels:],
            noised.target,
            noised.noisy_latents,
            noised.timesteps,
        )
        return with_bound(
            loss,
            self.config.vlb_weight * bound,
            num_instance=noised.num_instance,
            prior_loss_weight=self.prior_loss_weight,
        )

    def _simple_loss(self, prediction: Float[Tensor, "b c h w"], noised: NoisedBatch) -> DiffusionLoss:
        return diffusion_loss(
            prediction,
            noised.target,
            self._weights_of(noised.timesteps),
            num_instance=noised.num_instance,
            prior_loss_weight=self.prior_loss_weight,
            kind=self.config.loss,
            huber_c=self.config.huber_c if self.config.loss == "huber" else None,
        )
