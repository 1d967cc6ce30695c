"""How timesteps are drawn, what latents and noise are multiplied by, and what losses weigh."""

import pytest
import torch
from torch import Tensor

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.errors import ConfigError
from lowmem_db.objective.objective import Objective
from lowmem_db.objective.process import Diffusion, Flow, NoiseProcess
from lowmem_db.objective.weights import timestep_weights
from lowmem_db.randomness import generator
from tests.objective.test_objective import ALPHAS_CUMPROD, make_batch

CPU = torch.device("cpu")


def draw(process: NoiseProcess, count: int = 4000) -> Tensor:
    one = torch.Generator().manual_seed(0)
    return torch.stack([process.draw(one) for _ in range(count)]).double()


def objective_of(process: NoiseProcess, **fields: object) -> Objective:
    config = ObjectiveConfig.model_validate(fields)
    return Objective(config, process=process, prior_loss_weight=1.0, seed=7, device=CPU)


@pytest.mark.parametrize("process", [Diffusion(ALPHAS_CUMPROD, "epsilon"), Flow()], ids=["diffusion", "flow"])
def test_is_a_noise_process(process: NoiseProcess) -> None:
    assert isinstance(process, NoiseProcess)


def test_coefficients_of_a_diffusion_are_correctly_rounded() -> None:
    alpha, sigma, _, _ = Diffusion(ALPHAS_CUMPROD, "epsilon").coefficients(torch.arange(1000))
    assert torch.equal(alpha, ALPHAS_CUMPROD.double().sqrt().float())
    assert torch.equal(sigma, (1 - ALPHAS_CUMPROD.double()).sqrt().float())


def test_target_of_each_prediction_type() -> None:
    timesteps = torch.tensor([0, 400, 999])
    alpha, sigma = Diffusion(ALPHAS_CUMPROD, "epsilon").coefficients(timesteps)[:2]
    targets = {
        kind: Diffusion(ALPHAS_CUMPROD, kind).coefficients(timesteps)[2:]
        for kind in ("epsilon", "v_prediction", "sample")
    }
    expected = {"epsilon": ([0, 0, 0], [1, 1, 1]), "sample": ([1, 1, 1], [0, 0, 0])}
    for kind, rows in expected.items():
        assert [row.tolist() for row in targets[kind]] == list(rows)
    assert torch.equal(targets["v_prediction"][0], -sigma)
    assert torch.equal(targets["v_prediction"][1], alpha)


def test_timesteps_of_a_diffusion_are_those_of_earlier_versions() -> None:
    """A run that was begun by one resumes with the same draws."""
    drawn = objective_of(Diffusion(ALPHAS_CUMPROD, "epsilon")).timesteps(3, torch.tensor([0, 5]))
    before = [torch.randint(1000, (), generator=generator(7, "timesteps", 3, sample)) for sample in (0, 5)]
    assert drawn.tolist() == [int(timestep) for timestep in before]


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.prediction_type: 'flow_prediction'; allowed: epsilon"):
        Diffusion(ALPHAS_CUMPROD, "flow_prediction")


def test_weights_of_a_diffusion_are_taken_by_timestep() -> None:
    table = timestep_weights(ALPHAS_CUMPROD, "epsilon", snr_gamma=5.0, debiased=False)
    weights = Diffusion(ALPHAS_CUMPROD, "epsilon").weighting(snr_gamma=5.0, debiased=False)
    timesteps = torch.tensor([0, 10, 999])
    assert torch.equal(weights(timesteps), table[timesteps])


def test_flow_is_a_straight_line() -> None:
    alpha, sigma, of_latents, of_noise = Flow().coefficients(torch.tensor([0.0, 250.0, 1000.0]))
    assert sigma.tolist() == [0.0, 0.25, 1.0]
    assert alpha.tolist() == [1.0, 0.75, 0.0]
    assert of_latents.tolist() == [-1.0] * 3
    assert of_noise.tolist() == [1.0] * 3


def test_uniform_timesteps_of_a_flow() -> None:
    sigma = draw(Flow()) / 1000
    assert 0 <= sigma.min() <= sigma.max() <= 1
    assert abs(sigma.mean() - 0.5) < 0.02
    assert abs(sigma.std() - 12**-0.5) < 0.01


def test_shift_moves_timesteps_towards_the_noise() -> None:
    plain, shifted = draw(Flow()) / 1000, draw(Flow(shift=3.0)) / 1000
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), rtol=1e-6, atol=1e-7)


def test_logit_normal_timesteps() -> None:
    logits = torch.logit(draw(Flow(timesteps="logit_normal", logit_mean=0.5, logit_std=0.8)) / 1000)
    assert abs(logits.mean() - 0.5) < 0.05
    assert abs(logits.std() - 0.8) < 0.03


@pytest.mark.parametrize(
    "wrong", [{"shift": 0.0}, {"logit_std": -1.0}, {"num_train_timesteps": 0}, {"timesteps": "cosine"}]
)
def test_arguments_of_a_flow_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Flow(**wrong)


@pytest.mark.parametrize("fields", [{"snr_gamma": 5.0}, {"debiased": True}])
def test_weights_of_a_diffusion_are_refused_for_a_flow(fields: dict) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.{next(iter(fields))}: .* leave it out"):
        objective_of(Flow(), **fields)


def test_flow_through_the_objective() -> None:
    """A model that predicts noise minus latents exactly has no loss, and the latents are one step of sigma away."""
    objective, batch = objective_of(Flow(shift=3.0, timesteps="logit_normal")), make_batch(std=0.0)
    noised = objective.noise(batch, step=4)
    assert noised.timesteps.dtype == torch.float32
    assert objective.loss(noised.target, noised).total == 0
    sigma = (noised.timesteps / 1000).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noised.noisy_latents - sigma * noised.target, batch.latent_mean, rtol=1e-5, atol=1e-5)
