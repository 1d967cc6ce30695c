import pytest
import torch
from lowmem_db_kernels import noise, noise_tables

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)
TABLES = noise_tables(ALPHAS_CUMPROD)
IDS = torch.tensor([3, 2**40 + 1])
DRAW = {"seed": 2**64 - 3, "step": 2**32 - 1, "sample_ids": IDS}


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def timesteps():
    return torch.tensor([0, 999])


def test_tables_are_correctly_rounded():
    assert torch.equal(TABLES.sqrt_alphas_cumprod, ALPHAS_CUMPROD.sqrt().float())
    assert torch.equal(TABLES.sqrt_one_minus_alphas_cumprod, (1 - ALPHAS_CUMPROD).sqrt().float())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_agrees_with_the_scheduler_of_diffusers(latents, timesteps, prediction_type):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(trained_betas=BETAS.float().numpy())
    given = torch.randn(latents.shape)
    noisy, target = noise(latents, timesteps, TABLES, noise=given, prediction_type=prediction_type)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, given, timesteps), rtol=1e-5, atol=1e-5)
    velocity = scheduler.get_velocity(latents, given, timesteps)
    expected = {"epsilon": given, "v_prediction": velocity, "sample": latents}[prediction_type]
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)


def test_drawn_noise_is_the_target(latents, timesteps):
    noisy, target = noise(latents, timesteps, TABLES, **DRAW)
    again, _ = noise(latents, timesteps, TABLES, noise=target)
    assert torch.equal(noisy, again)


def test_a_sample_does_not_depend_on_its_batch(latents, timesteps):
    options = {"std": latents.abs(), "noise_offset": 0.1, "input_perturbation": 0.1}
    both = noise(latents, timesteps, TABLES, **DRAW, **options)
    options["std"] = options["std"][1:]
    alone = noise(latents[1:], timesteps[1:], TABLES, **DRAW | {"sample_ids": IDS[1:]}, **options)
    assert torch.equal(both[0][1:], alone[0])
    assert torch.equal(both[1][1:], alone[1])


def test_posterior_sample_has_mean_and_deviation():
    means = torch.full((1, 4, 64, 64), 3.0)
    _, target = noise(
        means, torch.tensor([5]), TABLES, std=means / 6, prediction_type="sample", **DRAW | {"sample_ids": IDS[:1]}
    )
    assert abs(target.mean() - 3) < 0.02
    assert abs(target.std() - 0.5) < 0.02


def test_offset_is_one_number_per_channel_and_belongs_to_the_target(latents, timesteps):
    plain = noise(latents, timesteps, TABLES, **DRAW)[1]
    offset = noise(latents, timesteps, TABLES, noise_offset=0.1, **DRAW)[1] - plain
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6)
    assert offset.abs().min() > 0


def test_perturbation_is_seen_by_the_model_only(latents, timesteps):
    plain = noise(latents, timesteps, TABLES, **DRAW)
    perturbed = noise(latents, timesteps, TABLES, input_perturbation=0.1, **DRAW)
    assert torch.equal(plain[1], perturbed[1])
    assert not torch.equal(plain[0], perturbed[0])


def test_results_share_no_memory_with_inputs(latents, timesteps):
    given = torch.randn(latents.shape)
    noise(latents, timesteps, TABLES, noise=given)[1].zero_()
    noise(latents, timesteps, TABLES, noise=given, prediction_type="sample")[1].zero_()
    assert given.any()
    assert latents.any()


@pytest.mark.parametrize("missing", ["seed", "step", "sample_ids"])
def test_missing_key_is_named(latents, timesteps, missing):
    with pytest.raises(ValueError, match=f"needs {missing}"):
        noise(latents, timesteps, TABLES, **{**DRAW, missing: None})


@pytest.mark.parametrize("wrong", [{"prediction_type": "flow"}, {"step": 2**32}, {"step": -1}])
def test_values_out_of_range_are_refused(latents, timesteps, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        noise(latents, timesteps, TABLES, **DRAW | wrong)


def test_operator_is_registered_correctly(latents, timesteps):
    operator = torch.ops.lowmem_db_kernels.noise.default
    arguments = (latents, timesteps, *TABLES, latents.abs(), None, IDS, 1, 2, 3, "sample", 0.1, 0.1, torch.bfloat16)
    torch.library.opcheck(operator, arguments)


def test_shapes_on_meta():
    latents = torch.empty(2, 4, 8, 8, device="meta")
    noisy, target = noise(
        latents, torch.empty(2, dtype=torch.int64, device="meta"), TABLES, noise=latents, out_dtype=torch.float16
    )
    assert (noisy.dtype, target.dtype) == (torch.float16, torch.float32)
    assert noisy.shape == target.shape == latents.shape
