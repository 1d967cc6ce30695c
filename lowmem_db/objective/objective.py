"""Equation 2 of DreamBooth (arXiv:2208.12242) on one batch of instance and prior samples."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from lowmem_db_kernels import DiffusionLoss, NoiseTables, diffusion_loss, noise, noise_tables
from torch import Tensor

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.objective.weights import timestep_weights
from lowmem_db.randomness import generator
from lowmem_db.records import Batch

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """What the denoiser gets, and what it shall predict; fp32."""

    noisy_latents: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    timesteps: Int[Tensor, " b"]
    num_instance: int


class Objective:
    """Draws noise and timesteps as a function of (seed, step, sample), and measures the prediction.

    Args:
        config: The section ``objective``.
        alphas_cumprod: The noise schedule of the model.
        prediction_type: What the model predicts: ``epsilon``, ``v_prediction`` or ``sample``.
        prior_loss_weight: Lambda of Equation 2.
        seed: The run's seed.
        device: Where the model is.

    Raises:
        ConfigError: The weights are infinite somewhere; see :func:`timestep_weights`.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        alphas_cumprod: Float[Tensor, " t"],
        prediction_type: PredictionType,
        prior_loss_weight: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.prediction_type: PredictionType = prediction_type
        self.prior_loss_weight = prior_loss_weight
        self.seed = seed
        self.num_train_timesteps = len(alphas_cumprod)
        self.weights = timestep_weights(
            alphas_cumprod, prediction_type, snr_gamma=config.snr_gamma, debiased=config.debiased
        ).to(device)
        tables = noise_tables(alphas_cumprod.double())
        self.tables = NoiseTables(*(table.to(device) for table in tables))

    def timesteps(self, step: int, sample_ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Draw a timestep for each sample, uniformly and independently."""
        draws = [
            torch.randint(self.num_train_timesteps, (), generator=generator(self.seed, "timesteps", step, sample))
            for sample in sample_ids.tolist()
        ]
        return torch.stack(draws)

    def noise(self, batch: Batch, step: int) -> NoisedBatch:
        """Draw latents, timesteps and noise; return noisy latents (arXiv:2006.11239, Eq. 4) and target.

        All arithmetic is fp32, whatever the model computes in.
        """
        device = self.weights.device
        timesteps = self.timesteps(step, batch.sample_ids).to(device)
        noisy_latents, target = noise(
            batch.latent_mean.to(device),
            timesteps,
            self.tables,
            std=batch.latent_std.to(device),
            seed=self.seed,
            step=step,
            sample_ids=batch.sample_ids.to(device),
            prediction_type=self.prediction_type,
            noise_offset=self.config.noise_offset,
            input_perturbation=self.config.input_perturbation,
        )
        return NoisedBatch(
            noisy_latents=noisy_latents, target=target, timesteps=timesteps, num_instance=batch.num_instance
        )

    def loss(self, prediction: Float[Tensor, "b c h w"], noised: NoisedBatch) -> DiffusionLoss:
        """Return Equation 2: each term is the mean over its own samples, and the gradient flows through ``total``."""
        return diffusion_loss(
            prediction,
            noised.target,
            noised.timesteps,
            self.weights,
            num_instance=noised.num_instance,
            prior_loss_weight=self.prior_loss_weight,
            kind=self.config.loss,
            huber_c=self.config.huber_c if self.config.loss == "huber" else None,
        )
