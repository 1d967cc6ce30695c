"""Zero terminal SNR: the schedule, the loss at the last timestep, the samplers, what ``final/`` says."""

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from lowmem_db.cli.train import train
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config, ObjectiveConfig
from lowmem_db.config.strategy import resolve
from lowmem_db.engine.build import build_step
from lowmem_db.engine.generate import generate_images
from lowmem_db.engine.source import find_source
from lowmem_db.errors import ConfigError
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import load_noise_schedule
from lowmem_db.objective.objective import Objective
from lowmem_db.objective.process import Diffusion
from lowmem_db.sampling.latents import SamplingSettings
from tests.objective.test_objective import make_batch
from tests.tiny_models import write_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A model of Stable Diffusion 2.x's prediction type."""
    return find_model(str(write_tiny_model(tmp_path_factory.mktemp("v") / "model", prediction_type="v_prediction")))


def config_of(fields: dict[str, object], **changes: object) -> Config:
    return load_config(None, list((fields | {f"objective.{name}": value for name, value in changes.items()}).items()))


def test_schedule_is_that_of_the_paper(model: ModelFolder) -> None:
    """Algorithm 1 of arXiv:2305.08891, written out in float64."""
    plain = load_noise_schedule(model).alphas_cumprod.double()
    root = plain.sqrt()
    shifted = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = load_noise_schedule(model, zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0
    torch.testing.assert_close(rescaled.alphas_cumprod.double(), shifted**2, rtol=2e-4, atol=1e-6)
    assert rescaled.config["timestep_spacing"] == "trailing"
    assert plain[-1] > 0


def test_a_schedule_that_is_rescaled_already_can_be_taken_back(model: ModelFolder, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", prediction_type="v_prediction")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    rescaled = find_model(str(folder))
    assert load_noise_schedule(rescaled).alphas_cumprod[-1] == 0
    plain = load_noise_schedule(rescaled, zero_terminal_snr=False).alphas_cumprod
    assert torch.equal(plain, load_noise_schedule(model).alphas_cumprod)


@pytest.mark.parametrize("fields", [{}, {"snr_gamma": 5.0}, {"debiased": True}])
def test_last_timestep_is_noise_alone_and_its_velocity_is_the_picture(
    model: ModelFolder, fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = load_noise_schedule(model, zero_terminal_snr=True)
    objective = Objective(
        ObjectiveConfig(**fields),
        process=Diffusion(schedule.alphas_cumprod, "v_prediction"),
        prior_loss_weight=1.0,
        seed=0,
        device=CPU,
    )
    monkeypatch.setattr(Objective, "timesteps", lambda self, step, ids: torch.full_like(ids, 999))
    batch = make_batch()
    noised = objective.noise(batch, 0)
    assert noised.noisy_latents.std() == pytest.approx(1.0, abs=0.1)
    assert torch.isfinite(objective.loss(torch.zeros_like(noised.target), noised).total)
    batch.latent_std.zero_()
    clean = objective.noise(batch, 0)
    torch.testing.assert_close(clean.target, -batch.latent_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_final_model_says_how_it_is_to_be_sampled(
    tiny_fields: dict[str, object], tmp_path: Path, scheduler: str
) -> None:
    """A sampler that does not know the field gives way to DDIM."""
    folder = write_tiny_model(tmp_path / "model")
    saved = getattr(diffusers, scheduler).from_config(DDPMScheduler.load_config(folder / "scheduler"))
    saved.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", scheduler]}
    (folder / "model_index.json").write_text(json.dumps(index))
    changes = {
        "model.base": str(folder), "objective.zero_terminal_snr": True, "objective.prediction_type": "v_prediction",
        "training.max_train_steps": 1, "prior.enabled": False,
    }  # fmt: skip
    train([f"{field}={json.dumps(value)}" for field, value in (tiny_fields | changes).items()])
    final = tmp_path / "run" / "final"
    pipeline = StableDiffusionPipeline.from_pretrained(final, local_files_only=True)
    config = pipeline.scheduler.config
    assert config["rescale_betas_zero_snr"] is True
    assert config["timestep_spacing"] == "trailing"
    assert config["prediction_type"] == "v_prediction"
    expected = "DDIMScheduler" if scheduler == "PNDMScheduler" else scheduler
    assert type(pipeline.scheduler).__name__ == expected
    assert "rescale_betas_zero_snr" in inspect.signature(type(pipeline.scheduler)).parameters
    assert load_noise_schedule(find_model(str(final))).alphas_cumprod[-1] == 0
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a dog", num_inference_steps=2, height=32, width=32, guidance_rescale=0.7, output_type="pt")
    assert torch.isfinite(torch.as_tensor(drawn.images)).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver"])
def test_every_sampler_starts_at_the_last_timestep(tmp_path: Path, sampler: str) -> None:
    folder = write_tiny_model(tmp_path / "model", prediction_type="v_prediction")
    file = folder / "scheduler" / "scheduler_config.json"
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    settings = SamplingSettings(sampler=sampler, num_inference_steps=4, guidance_scale=5.0)
    ((_, (picture,)),) = generate_images(
        find_source(str(folder)),
        ["a dog"],
        settings,
        num_images=1,
        resolution=32,
        seed=0,
        device=CPU,
        dtype=torch.float32,
    )
    low, high = picture.convert("L").getextrema()
    assert low < high
    model = find_model(str(folder))
    scheduler = model.family.sampler(model, sampler)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999


def test_epsilon_is_refused_where_the_model_says_it(tiny_fields: dict[str, object], tiny_model: Path) -> None:
    config = config_of(tiny_fields, zero_terminal_snr=True)
    with pytest.raises(ConfigError, match=r"objective\.prediction_type: this model predicts epsilon"):
        build_step(resolve(config), find_model(str(tiny_model)), CPU)
