"""The loss against a plain reference of Equation 2, the noising against float64, the weights against their formulas."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.errors import ConfigError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.stable_diffusion import SD_OF_ANY_WIDTH
from lowmem_db.models.names import published_name
from lowmem_db.objective.objective import NoisedBatch, Objective
from lowmem_db.objective.process import Diffusion
from lowmem_db.objective.weights import timestep_weights
from lowmem_db.records import Batch, Conditioning
from tests.tiny_models import NUM_TOKENS, tiny_text_encoder, tiny_unet

SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ALPHAS_CUMPROD = SCHEDULE.alphas_cumprod
NAMED_PARAMETERS = (
    "conv_in.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.1.resnets.0.norm1.weight",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
    "conv_out.bias",
)
TEXT_ENCODER_PARAMETERS = (
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "text_model.encoder.layers.1.mlp.fc2.weight",
    "text_model.final_layer_norm.bias",
)


def build(prediction_type: str = "epsilon", *, prior_loss_weight: float = 1.0, **fields: object) -> Objective:
    return Objective(
        ObjectiveConfig.model_validate(fields),
        process=Diffusion(ALPHAS_CUMPROD, prediction_type),
        prior_loss_weight=prior_loss_weight,
        seed=7,
        device=torch.device("cpu"),
    )


def make_batch(num_instance: int = 2, num_prior: int = 2, size: int = 8, *, std: float = 0.3) -> Batch:
    generator = torch.Generator().manual_seed(3)
    count = num_instance + num_prior
    mean = torch.randn(count, 4, size, size, generator=generator)
    return Batch(
        latent_mean=mean,
        latent_std=torch.full_like(mean, std),
        conditioning=Conditioning(
            tokens={"input_ids": torch.randint(0, 512, (count, NUM_TOKENS), generator=generator)}
        ),
        sample_ids=torch.arange(count),
        num_instance=num_instance,
        sources=tuple(f"{index}.png" for index in range(count)),
    )


def reference_weights(timesteps: Tensor, prediction_type: str, gamma: float | None) -> Tensor:
    if gamma is None:
        return torch.ones(len(timesteps), dtype=torch.float64)
    alphas = ALPHAS_CUMPROD.double()[timesteps]
    snr = alphas / (1 - alphas)
    capped = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64))
    return {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[prediction_type]


def reference_loss(
    prediction: Tensor, noised: NoisedBatch, prediction_type: str, gamma: float | None, prior_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 2, written down a second time: each term a mean over its own samples, weighted sample by sample."""
    weights = reference_weights(noised.timesteps, prediction_type, gamma).to(prediction.dtype)
    errors = ((prediction - noised.target.to(prediction.dtype)) ** 2).mean(dim=(1, 2, 3)) * weights
    instance = errors[: noised.num_instance].mean()
    prior = errors[noised.num_instance :].mean() if len(errors) > noised.num_instance else torch.zeros(())
    return instance + prior_loss_weight * prior, instance, prior


@pytest.mark.parametrize(
    ("prediction_type", "prior", "gamma", "offset", "trains_text_encoder"),
    itertools.product(("epsilon", "v_prediction", "sample"), (True, False), (None, 5.0), (0.0, 0.1), (True, False)),
)
def test_loss_and_gradients_equal_a_plain_reference(
    prediction_type: str, prior: bool, gamma: float | None, offset: float, trains_text_encoder: bool
) -> None:
    torch.manual_seed(0)
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    batch = make_batch(num_prior=2 if prior else 0)
    objective = build(prediction_type, prior_loss_weight=0.7, snr_gamma=gamma, noise_offset=offset)
    noised = objective.noise(batch, step=11)
    if not trains_text_encoder:
        embeds = text_encoder(batch.conditioning.tokens["input_ids"])[0].detach()
        conditioning = Conditioning(tokens={}, embeds={"embeds": embeds})
        modules, names = {"unet": unet}, NAMED_PARAMETERS
    else:
        conditioning, modules = batch.conditioning, {"unet": unet, "text_encoder": text_encoder}
        names = (*NAMED_PARAMETERS, *TEXT_ENCODER_PARAMETERS)
    parameters = dict(unet.named_parameters())
    parameters |= {published_name("text_encoder", name): value for name, value in text_encoder.named_parameters()}

    loss = objective.loss(
        Denoiser(SD_OF_ANY_WIDTH, modules).predict(noised.noisy_latents, noised.timesteps, conditioning), noised
    )
    gradients = torch.autograd.grad(loss.total, [parameters[name] for name in names])

    hidden = text_encoder(batch.conditioning.tokens["input_ids"])[0]
    prediction = unet(noised.noisy_latents, noised.timesteps, encoder_hidden_states=hidden).sample
    total, instance, prior_loss = reference_loss(prediction, noised, prediction_type, gamma, 0.7)
    expected = torch.autograd.grad(total, [parameters[name] for name in names])

    torch.testing.assert_close(loss.total, total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.instance, instance.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.prior, prior_loss.detach(), rtol=1e-6, atol=1e-6)
    for name, gradient, reference in zip(names, gradients, expected, strict=True):
        error = (gradient - reference).norm() / reference.norm()
        assert error < 1e-6, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noising_is_exact_against_float64_at_every_timestep(prediction_type: str) -> None:
    count = len(ALPHAS_CUMPROD)
    batch = make_batch(num_instance=count, num_prior=0, size=2, std=0.0)
    objective = build(prediction_type)
    objective.timesteps = lambda step, sample_ids: torch.arange(count)  # type: ignore[method-assign]
    noise = build("epsilon")
    noise.timesteps = objective.timesteps  # type: ignore[method-assign]
    epsilon = noise.noise(batch, step=0).target.double()
    noised = objective.noise(batch, step=0)

    alphas = ALPHAS_CUMPROD.double().view(-1, 1, 1, 1)
    latents = batch.latent_mean.double()
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * epsilon
    target = {
        "epsilon": epsilon,
        "v_prediction": alphas.sqrt() * epsilon - (1 - alphas).sqrt() * latents,
        "sample": latents,
    }[prediction_type]
    ulps = 4 * torch.finfo(torch.float32).eps
    scale = alphas.sqrt() * latents.abs() + (1 - alphas).sqrt() * epsilon.abs()
    assert ((noised.noisy_latents.double() - noisy).abs() <= ulps * scale).all()
    assert ((noised.target.double() - target).abs() <= ulps * (scale + latents.abs() + epsilon.abs())).all()


def test_low_precision_model_does_not_touch_the_noising() -> None:
    """With bf16 coefficients sqrt(1 - alphas_cumprod) would be 0 at the first timesteps."""
    sigma = build().process.coefficients(torch.tensor([0])).sigma
    assert sigma.dtype == torch.float32
    assert sigma[0] > 0.02


def test_draws_depend_on_seed_step_and_sample_alone() -> None:
    objective, batch = build(noise_offset=0.1, input_perturbation=0.1), make_batch()
    whole = objective.noise(batch, step=5)
    last = Batch(
        latent_mean=batch.latent_mean[3:],
        latent_std=batch.latent_std[3:],
        conditioning=Conditioning(tokens={"input_ids": batch.conditioning.tokens["input_ids"][3:]}),
        sample_ids=batch.sample_ids[3:],
        num_instance=0,
        sources=batch.sources[3:],
    )
    alone = objective.noise(last, step=5)
    assert torch.equal(whole.noisy_latents[3:], alone.noisy_latents)
    assert torch.equal(whole.target[3:], alone.target)
    assert torch.equal(whole.timesteps[3:], alone.timesteps)
    assert not torch.equal(whole.target, objective.noise(batch, step=6).target)
    assert not torch.equal(whole.target[0], whole.target[1])


def test_latents_are_sampled_from_their_moments() -> None:
    batch = make_batch(num_instance=400, num_prior=0, std=0.5)
    latents = build("sample").noise(batch, step=0).target
    residual = (latents - batch.latent_mean) / 0.5
    assert abs(residual.mean()) < 0.01
    assert abs(residual.std() - 1) < 0.01


def test_timesteps_are_uniform_and_independent() -> None:
    draws = torch.stack([build().timesteps(step, torch.arange(8)) for step in range(1000)])
    assert draws.min() < 5
    assert draws.max() > 994
    counts = torch.histc(draws.float(), bins=10, min=0, max=1000)
    assert ((counts - 800).abs() < 5 * 800**0.5).all()
    centred = draws.float() - 499.5
    correlation = (centred[:, 0] * centred[:, 4]).mean() / centred.square().mean()
    assert abs(correlation) < 0.15


@pytest.mark.parametrize("kind", ["mse", "huber", "l1"])
def test_distances(kind: str) -> None:
    objective, batch = build(loss=kind, huber_c=0.2), make_batch()
    noised = objective.noise(batch, step=0)
    prediction = torch.zeros_like(noised.target)
    difference = noised.target.double()
    error = {
        "mse": difference**2,
        "huber": 2 * 0.2 * ((difference**2 + 0.2**2).sqrt() - 0.2),
        "l1": difference.abs(),
    }[kind].mean(dim=(1, 2, 3))
    loss = objective.loss(prediction, noised)
    torch.testing.assert_close(loss.per_sample.double(), error, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss.total.double(), error[:2].mean() + error[2:].mean(), rtol=1e-6, atol=1e-7)


def test_min_snr_weights_with_prior_are_per_sample() -> None:
    """With one instance and one prior sample, each is weighted by its own timestep, the prior one too."""
    objective, batch = build(snr_gamma=5.0), make_batch(num_instance=1, num_prior=1)
    noised = objective.noise(batch, step=2)
    loss = objective.loss(torch.zeros_like(noised.target), noised)
    weights = reference_weights(noised.timesteps, "epsilon", 5.0).float()
    errors = (noised.target**2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.instance, weights[0] * errors[0])
    torch.testing.assert_close(loss.prior, weights[1] * errors[1])


def test_non_finite_prediction_is_flagged() -> None:
    objective, batch = build(), make_batch()
    noised = objective.noise(batch, step=0)
    prediction = torch.zeros_like(noised.target)
    assert objective.loss(prediction, noised).finite
    prediction[2, 0, 0, 0] = float("nan")
    loss = objective.loss(prediction, noised)
    assert not loss.finite
    assert torch.isfinite(loss.per_sample).tolist() == [True, True, False, True]


def test_weights_at_zero_terminal_snr() -> None:
    alphas = torch.cat([ALPHAS_CUMPROD[:-1], torch.zeros(1)])
    assert timestep_weights(alphas, "epsilon", snr_gamma=5.0, debiased=False)[-1] == 1
    assert timestep_weights(alphas, "v_prediction", snr_gamma=5.0, debiased=False)[-1] == 0
    with pytest.raises(ConfigError, match=r"objective\.snr_gamma=5"):
        timestep_weights(alphas, "epsilon", snr_gamma=None, debiased=True)


def test_debiased_weights() -> None:
    weights = timestep_weights(ALPHAS_CUMPROD, "epsilon", snr_gamma=None, debiased=True)
    snr = ALPHAS_CUMPROD.double() / (1 - ALPHAS_CUMPROD.double())
    torch.testing.assert_close(weights.double(), snr.clamp(max=1000.0) ** -0.5, rtol=1e-6, atol=0)
