import pytest
import torch
from lowmem_db_kernels import NoiseCoefficients, noise

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)
TIMESTEPS = torch.tensor([0, 999])
ALPHA, SIGMA = ALPHAS_CUMPROD.sqrt().float()[TIMESTEPS], (1 - ALPHAS_CUMPROD).sqrt().float()[TIMESTEPS]
ZEROS, ONES = torch.zeros(2), torch.ones(2)
EPSILON, VELOCITY, SAMPLE, FLOW = (
    NoiseCoefficients(*rows)
    for rows in (
        (ALPHA, SIGMA, ZEROS, ONES),
        (ALPHA, SIGMA, -SIGMA, ALPHA),
        (ALPHA, SIGMA, ONES, ZEROS),
        (1 - SIGMA, SIGMA, -ONES, ONES),
    )
)
IDS = torch.tensor([3, 2**40 + 1])
DRAW = {"seed": 2**64 - 3, "step": 2**32 - 1, "sample_ids": IDS}


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("coefficients", [EPSILON, VELOCITY, SAMPLE], ids=["epsilon", "v_prediction", "sample"])
def test_agrees_with_the_scheduler_of_diffusers(latents, coefficients):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(trained_betas=BETAS.float().numpy())
    drawn = noise(latents, EPSILON, **DRAW)[1]
    noisy, target = noise(latents, coefficients, **DRAW)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, drawn, TIMESTEPS), rtol=1e-5, atol=1e-5)
    velocity = scheduler.get_velocity(latents, drawn, TIMESTEPS)
    expected = {id(EPSILON): drawn, id(VELOCITY): velocity, id(SAMPLE): latents}[id(coefficients)]
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)


def test_target_of_a_flow_is_the_way_from_latents_to_noise(latents):
    drawn = noise(latents, EPSILON, **DRAW)[1]
    noisy, target = noise(latents, FLOW, **DRAW)
    sigma = SIGMA.reshape(-1, 1, 1, 1)
    assert torch.equal(target, drawn - latents)
    assert torch.equal(noisy, (1 - sigma) * latents + sigma * drawn)


def test_target_of_noise_or_latents_alone_has_their_bits(latents):
    """0 x + 1 e would be NaN where x is infinite, and turn -0 into 0."""
    latents[0, 0, 0, :3] = torch.tensor([float("inf"), float("nan"), -0.0])
    drawn = noise(torch.zeros_like(latents), EPSILON, **DRAW)[1]
    assert torch.equal(noise(latents, EPSILON, **DRAW)[1], drawn)
    target = noise(latents, SAMPLE, **DRAW)[1]
    assert torch.equal(target.view(torch.int32), latents.view(torch.int32))


def test_a_sample_does_not_depend_on_its_batch(latents):
    options = {"std": latents.abs(), "noise_offset": 0.1, "input_perturbation": 0.1}
    both = noise(latents, EPSILON, **DRAW, **options)
    options["std"] = options["std"][1:]
    last = NoiseCoefficients(*(values[1:] for values in EPSILON))
    alone = noise(latents[1:], last, **DRAW | {"sample_ids": IDS[1:]}, **options)
    assert torch.equal(both[0][1:], alone[0])
    assert torch.equal(both[1][1:], alone[1])


def test_posterior_sample_has_mean_and_deviation():
    means = torch.full((1, 4, 64, 64), 3.0)
    one = NoiseCoefficients(*(values[:1] for values in SAMPLE))
    _, target = noise(means, one, std=means / 6, **DRAW | {"sample_ids": IDS[:1]})
    assert abs(target.mean() - 3) < 0.02
    assert abs(target.std() - 0.5) < 0.02


def test_offset_is_one_number_per_channel_and_belongs_to_the_target(latents):
    plain = noise(latents, EPSILON, **DRAW)[1]
    offset = noise(latents, EPSILON, noise_offset=0.1, **DRAW)[1] - plain
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6)
    assert offset.abs().min() > 0


def test_perturbation_is_seen_by_the_model_only(latents):
    plain = noise(latents, EPSILON, **DRAW)
    perturbed = noise(latents, EPSILON, input_perturbation=0.1, **DRAW)
    assert torch.equal(plain[1], perturbed[1])
    assert not torch.equal(plain[0], perturbed[0])


def test_results_share_no_memory_with_inputs(latents):
    for result in noise(latents, SAMPLE, **DRAW):
        result.zero_()
    assert latents.any()


@pytest.mark.parametrize("step", [2**32, -1])
def test_step_out_of_range_is_refused(latents, step):
    with pytest.raises(ValueError, match=f"step={step}"):
        noise(latents, EPSILON, **DRAW | {"step": step})


@pytest.mark.parametrize("sigma", [SIGMA.double(), SIGMA[:1], SIGMA.reshape(2, 1)], ids=["float64", "one", "matrix"])
def test_coefficients_are_a_number_for_each_sample(latents, sigma):
    with pytest.raises(ValueError, match=r"sigma is .* one fp32 number for each of the 2 samples"):
        noise(latents, EPSILON._replace(sigma=sigma), **DRAW)


def test_operator_is_registered_correctly(latents):
    operator = torch.ops.lowmem_db_kernels.noise.default
    torch.library.opcheck(operator, (latents, *SAMPLE, latents.abs(), IDS, 1, 2, 3, 0.1, 0.1))


def test_shapes_on_meta():
    latents = torch.empty(2, 4, 8, 8, device="meta", dtype=torch.bfloat16)
    coefficients = NoiseCoefficients(*(values.to("meta") for values in EPSILON))
    noisy, target = noise(latents, coefficients, **DRAW | {"sample_ids": IDS.to("meta")})
    assert (noisy.dtype, target.dtype) == (torch.float32, torch.float32)
    assert noisy.shape == target.shape == latents.shape
