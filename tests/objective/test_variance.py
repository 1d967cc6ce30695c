"""The hybrid loss against the formulas of arXiv:2102.09672, written down a second time in float64."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.errors import ConfigError
from lowmem_db.objective.objective import NoisedBatch, Objective
from lowmem_db.objective.process import Diffusion, Flow
from lowmem_db.objective.variance import VariationalBound

CPU = torch.device("cpu")
ALPHAS_CUMPROD = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
TIMESTEPS = (0, 1, 2, 10, 499, 998, 999)


def bound_by_hand(predicted: Tensor, output: Tensor, noise: Tensor, clean: Tensor, timestep: int) -> float:
    """Eq. 4 to 6, 9 to 11 and 15, with the clean picture; nats for each value, times the number of timesteps."""
    total = ALPHAS_CUMPROD.double()
    bar, before = total[timestep], total[timestep - 1] if timestep else torch.tensor(1.0, dtype=torch.float64)
    beta, alpha = 1 - bar / before, bar / before
    noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
    posterior = beta * (1 - before) / (1 - bar)
    if timestep == 0:  # the variance of the second step is the lower bound, because this one is 0
        posterior = (1 - total[1] / total[0]) * (1 - total[0]) / (1 - total[1])
    share = (output + 1) / 2
    variance = torch.exp(share * beta.log() + (1 - share) * posterior.log())
    mean = (noisy - beta / (1 - bar).sqrt() * predicted) / alpha.sqrt()
    ours = Normal(mean, variance.sqrt())
    if timestep == 0:
        values = torch.zeros_like(clean)
        for place, value in enumerate(clean.flatten()):
            one = Normal(mean.flatten()[place], variance.flatten()[place].sqrt())
            upper = 1.0 if value > 0.999 else float(one.cdf(value + 1 / 255))
            lower = 0.0 if value < -0.999 else float(one.cdf(value - 1 / 255))
            values.view(-1)[place] = -math.log(max(upper - lower, 1e-12))
        return 1000 * float(values.mean())
    true_mean = before.sqrt() * beta / (1 - bar) * clean + alpha.sqrt() * (1 - before) / (1 - bar) * noisy
    return 1000 * float(kl_divergence(Normal(true_mean, posterior.sqrt()), ours).mean())


def drawn(timestep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(timestep)
    noise, other, output = (torch.randn(2, 3, 4, 4, generator=generator).double() for _ in range(3))
    clean = torch.randint(0, 256, (2, 3, 4, 4), generator=generator).double() / 127.5 - 1
    clean[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    return noise + 0.1 * other, output.tanh(), noise, clean


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_bound_is_that_of_the_formulas(timestep: int) -> None:
    bound = VariationalBound(Diffusion(ALPHAS_CUMPROD, "epsilon"), CPU)
    predicted, output, noise, clean = drawn(timestep)
    bar = ALPHAS_CUMPROD.double()[timestep]
    noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
    found = bound(*(each.float() for each in (predicted, output, noise, noisy)), torch.full((2,), timestep))
    for row in range(2):
        expected = bound_by_hand(predicted[row], output[row], noise[row], clean[row], timestep)
        assert found[row].item() == pytest.approx(expected, rel=2e-3 if timestep == 0 else 1e-4)


def test_bound_is_least_at_the_true_variance() -> None:
    """With the right noise the best variance is the posterior's, at output -1; with a wrong one it is larger."""
    bound = VariationalBound(Diffusion(ALPHAS_CUMPROD, "epsilon"), CPU)
    noise, noisy, timesteps = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.tensor([50])
    outputs = [torch.full((1, 3, 4, 4), value) for value in (-1.0, 0.0, 1.0)]
    right = [bound(noise, output, noise, noisy, timesteps).item() for output in outputs]
    assert right[0] == pytest.approx(0, abs=1e-3)
    assert right == sorted(right)
    wrong = [bound(noise + 3, output, noise, noisy, timesteps).item() for output in outputs]
    assert wrong == sorted(wrong, reverse=True)


def objective(variance: str, **fields: object) -> Objective:
    return Objective(
        ObjectiveConfig.model_validate({"variance": variance, **fields}),
        process=Diffusion(ALPHAS_CUMPROD, "epsilon"),
        prior_loss_weight=0.5,
        seed=0,
        device=CPU,
    )


def test_mean_learns_from_the_simple_loss_and_the_variance_from_the_bound() -> None:
    predicted, output, noise, clean = (each.float() for each in drawn(10))
    noised = NoisedBatch(noisy_latents=clean, target=noise, timesteps=torch.tensor([10, 400]), num_instance=1)
    mean, both = (predicted.clone().requires_grad_() for _ in range(2))
    variance = output.clone().requires_grad_()
    simple = objective("frozen").loss(mean, noised)
    hybrid = objective("hybrid", vlb_weight=0.01).loss(torch.cat([both, variance], dim=1), noised)
    simple.total.backward()
    hybrid.total.backward()
    assert torch.equal(mean.grad, both.grad)
    assert (variance.grad != 0).all()
    bound = VariationalBound(Diffusion(ALPHAS_CUMPROD, "epsilon"), CPU)
    own = 0.01 * bound(predicted, output, noise, clean, noised.timesteps)
    torch.testing.assert_close(hybrid.total, simple.total + own[0] + 0.5 * own[1])
    torch.testing.assert_close(hybrid.packed[0], hybrid.total.detach())
    torch.testing.assert_close(hybrid.per_sample, simple.per_sample + own)
    assert (hybrid.instance - simple.instance).item() == pytest.approx(own[0].item(), rel=1e-5)
    assert (hybrid.prior - simple.prior).item() == pytest.approx(own[1].item(), rel=1e-5)


def test_variance_that_is_not_finite_is_told() -> None:
    predicted, output, noise, clean = (each.float() for each in drawn(10))
    output[0, 0, 0, 0] = torch.nan
    noised = NoisedBatch(noisy_latents=clean, target=noise, timesteps=torch.tensor([10, 400]), num_instance=1)
    loss = objective("hybrid").loss(torch.cat([predicted, output], dim=1), noised)
    assert loss.finite.item() == 0
    assert loss.per_sample.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("process", [Flow(), Diffusion(ALPHAS_CUMPROD, "v_prediction")])
def test_other_predictions_are_refused(process: Diffusion | Flow) -> None:
    with pytest.raises(ConfigError, match=r"objective\.variance: 'hybrid' needs a diffusion model"):
        VariationalBound(process, CPU)
