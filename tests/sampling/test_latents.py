"""The sampling loop, against diffusers' own pipeline with the same initial noise."""

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.clip import encode_prompt, tokenize
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import load_noise_schedule
from lowmem_db.randomness import generator
from lowmem_db.records import Conditioning
from lowmem_db.sampling.latents import SamplingSettings, sample_latents

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm_solver": DPMSolverMultistepScheduler}
CONFIGS = Path(__file__).parents[1] / "assets" / "model_configs"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFolder:
    return find_model(str(tiny_model))


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    model: ModelFolder,
    sampler: str,
    indices: list[int],
    *,
    guidance_scale: float = 3.0,
    steps: int = 4,
    schedule: DDPMScheduler | None = None,
    size: int = 16,
) -> Tensor:
    embeds = encode_prompt(model.load("text_encoder"), tokenize(model.load("tokenizer"), ["a dog", ""]))
    schedule = schedule or load_noise_schedule(model)
    return sample_latents(
        Denoiser(model.family, {"unet": model.load("unet")}),
        SAMPLERS[sampler].from_config(schedule.config),
        SamplingSettings(sampler=sampler, num_inference_steps=steps, guidance_scale=guidance_scale),
        Conditioning(tokens={}, embeds={"embeds": embeds}),
        shape=(4, size, size),
        generators=[generator(0, "samples", index) for index in indices],
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("config", ["tiny", "sd15", "sd21"])
def test_latents_are_those_of_diffusers_pipeline(
    model: ModelFolder, pipeline: StableDiffusionPipeline, sampler: str, config: str
) -> None:
    folder = model.path / "scheduler" if config == "tiny" else CONFIGS / config / "scheduler"
    schedule = DDPMScheduler.from_config(DDPMScheduler.load_config(folder), clip_sample=False)
    pipeline.scheduler = SAMPLERS[sampler].from_config(SAMPLERS[sampler].load_config(folder), clip_sample=False)
    noise = generator(0, "samples", 0)
    latents = torch.randn(1, 4, 16, 16, generator=noise)
    theirs = pipeline(
        "a dog", latents=latents, generator=noise, num_inference_steps=4, guidance_scale=3.0, output_type="latent"
    ).images
    ours = draw(model, sampler, [0], schedule=schedule)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_depends_on_its_own_generator_alone(model: ModelFolder, sampler: str) -> None:
    alone = torch.cat([draw(model, sampler, [index]) for index in range(3)])
    together = draw(model, sampler, [0, 1, 2])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(draw(model, sampler, [0, 1, 2]), together)
    for one, other in itertools.combinations(together, 2):
        assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_of_one_is_the_prompt_alone(
    model: ModelFolder, pipeline: StableDiffusionPipeline, sampler: str
) -> None:
    pipeline.scheduler = SAMPLERS[sampler].from_config(load_noise_schedule(model).config)
    noise = generator(0, "samples", 0)
    latents = torch.randn(1, 4, 16, 16, generator=noise)
    prompted = pipeline(
        "a dog", latents=latents, generator=noise, num_inference_steps=4, guidance_scale=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(draw(model, sampler, [0], guidance_scale=1.0), prompted, atol=1e-4, rtol=1e-4)


def test_guidance_of_zero_is_the_empty_prompt(model: ModelFolder, pipeline: StableDiffusionPipeline) -> None:
    pipeline.scheduler = DDIMScheduler.from_config(load_noise_schedule(model).config)
    latents = torch.randn(1, 4, 16, 16, generator=generator(0, "samples", 0))
    empty = pipeline("", latents=latents, num_inference_steps=4, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(draw(model, "ddim", [0], guidance_scale=0.0), empty, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_schedule_that_ends_in_pure_noise_gives_finite_latents(
    model: ModelFolder, sampler: str, spacing: str, steps: int
) -> None:
    schedule = DDPMScheduler.from_config(
        load_noise_schedule(model).config,
        rescale_betas_zero_snr=True,
        timestep_spacing=spacing,
        prediction_type="v_prediction",
    )
    assert schedule.alphas_cumprod[-1] == 0
    drawn = draw(model, sampler, [0], schedule=schedule, steps=steps)
    assert torch.isfinite(drawn).all()
    assert drawn.abs().max() < 100


@pytest.mark.parametrize("size", [1, 3, 13, 17])
def test_odd_sizes_can_be_drawn(model: ModelFolder, size: int) -> None:
    assert draw(model, "ddim", [0], size=size, steps=1).shape == (1, 4, size, size)
