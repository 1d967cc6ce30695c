"""Equation 2 of DreamBooth (arXiv:2208.12242) on one batch of instance and prior samples."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.objective.weights import timestep_weights
from lowmem_db.randomness import generator
from lowmem_db.records import Batch


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """What the denoiser gets, and what it shall predict; fp32."""

    noisy_latents: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    timesteps: Int[Tensor, " b"]
    num_instance: int


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of one batch.

    Attributes:
        total: ``instance + prior_loss_weight * prior``; the gradient flows through it.
        instance: First term of Equation 2.
        prior: Second term before its factor; zero without prior samples.
        per_sample: Weighted mean error of each sample.
        finite: Whether every sample's error is finite.
    """

    total: Float[Tensor, ""]
    instance: Float[Tensor, ""]
    prior: Float[Tensor, ""]
    per_sample: Float[Tensor, " b"]
    finite: Bool[Tensor, ""]


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
        prediction_type: str,
        prior_loss_weight: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.prediction_type = prediction_type
        self.prior_loss_weight = prior_loss_weight
        self.seed = seed
        self.num_train_timesteps = len(alphas_cumprod)
        self.weights = timestep_weights(
            alphas_cumprod, prediction_type, snr_gamma=config.snr_gamma, debiased=config.debiased
        ).to(device)
        self.sqrt_alphas_cumprod = alphas_cumprod.double().sqrt().float().to(device)
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod.double()).sqrt().float().to(device)

    def timesteps(self, step: int, sample_ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Draw a timestep for each sample, uniformly and independently."""
        draws = [
            torch.randint(self.num_train_timesteps, (), generator=generator(self.seed, "timesteps", step, sample))
            for sample in sample_ids.tolist()
        ]
        return torch.stack(draws)

    def noise(self, batch: Batch, step: int) -> NoisedBatch:
        """Draw a sample of the latents, timesteps and noise; return noisy latents and target (arXiv:2006.11239, Eq. 4).

        All arithmetic is fp32, whatever the model computes in.
        """
        device = self.weights.device
        timesteps = self.timesteps(step, batch.sample_ids).to(device)
        latents = batch.latent_mean.to(device) + batch.latent_std.to(device) * self._normal("posterior", batch, step)
        noise = self._normal("noise", batch, step)
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * self._normal("noise_offset", batch, step, per_channel=True)
        alpha = self.sqrt_alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        sigma = self.sqrt_one_minus_alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        input_noise = noise
        if self.config.input_perturbation:
            input_noise = noise + self.config.input_perturbation * self._normal("input_perturbation", batch, step)
        targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}
        return NoisedBatch(
            noisy_latents=alpha * latents + sigma * input_noise,
            target=targets[self.prediction_type],
            timesteps=timesteps,
            num_instance=batch.num_instance,
        )

    def loss(self, prediction: Float[Tensor, "b c h w"], noised: NoisedBatch) -> Loss:
        """Return Equation 2: each term is the mean over its own samples."""
        per_sample = self._distance(prediction.float(), noised.target) * self.weights[noised.timesteps]
        instance = per_sample[: noised.num_instance].mean()
        prior_samples = per_sample[noised.num_instance :]
        prior = prior_samples.mean() if len(prior_samples) else torch.zeros_like(instance)
        return Loss(
            total=instance + self.prior_loss_weight * prior,
            instance=instance.detach(),
            prior=prior.detach(),
            per_sample=per_sample.detach(),
            finite=torch.isfinite(per_sample.detach()).all(),
        )

    def _distance(self, prediction: Tensor, target: Tensor) -> Float[Tensor, " b"]:
        difference = prediction - target
        if self.config.loss == "l1":
            error = difference.abs()
        elif self.config.loss == "huber":
            c = self.config.huber_c
            error = 2 * c * ((difference.square() + c * c).sqrt() - c)
        else:
            error = difference.square()
        return error.flatten(1).mean(1)

    def _normal(self, stream: str, batch: Batch, step: int, *, per_channel: bool = False) -> Tensor:
        _, channels, height, width = batch.latent_mean.shape
        shape = (channels, 1, 1) if per_channel else (channels, height, width)
        draws = [
            torch.randn(shape, generator=generator(self.seed, stream, step, sample))
            for sample in batch.sample_ids.tolist()
        ]
        return torch.stack(draws).to(self.weights.device)
