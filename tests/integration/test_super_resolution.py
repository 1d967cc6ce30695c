"""DeepFloyd IF's second stage on a tiny model: low-resolution pictures, the noise on them, and the chain of stages.

The judge is diffusers' pipeline. Its training script is none: it conditions on the picture itself, at full size.
"""

import json
import signal
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import DDPMScheduler, IFSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate, mse_loss

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.engine.build import build_step
from lowmem_db.engine.draw import Artist, Given, Job
from lowmem_db.engine.enlarging import find_stages, without_identifier
from lowmem_db.engine.fitting import check_fits
from lowmem_db.errors import ConfigError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import find_model, model_of
from lowmem_db.models.text_encoders import embed_prompts, load_text_encoders
from lowmem_db.objective.low_resolution import STREAM, LowResolution, enlarged, level_of, reduced
from lowmem_db.planning.plan import plan
from lowmem_db.planning.target import target_of_device
from lowmem_db.preparation.prepare import check_photos, prepare
from lowmem_db.randomness import generator
from lowmem_db.sampling.images import to_pixels
from lowmem_db.sampling.latents import SamplingSettings
from tests.cli.conftest import Run
from tests.cli.conftest import run as run
from tests.integration.test_resume import final_bytes, kill_in_step, metric_rows, run_in_child
from tests.tiny_models import IF_RESOLUTION, write_tiny_if, write_tiny_if_super_resolution

CPU = torch.device("cpu")
RESOLUTION = 2 * IF_RESOLUTION
COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_if_super_resolution(tmp_path_factory.mktemp("if") / "stage_2")


@pytest.fixture
def fields(tiny_fields: dict[str, object], stage_2: Path) -> dict[str, object]:
    return tiny_fields | {
        "model.base": str(stage_2), "data.resolution": RESOLUTION, "prior.enabled": False,
        "super_resolution.low_resolution": IF_RESOLUTION, "training.max_train_steps": 2,
    }  # fmt: skip


def config_of(fields: dict[str, object], **changes: object) -> Config:
    given = fields | {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(None, list(given.items()))


def pipeline_of(folder: Path) -> IFSuperResolutionPipeline:
    if transformers.__version__ < "5":
        pytest.skip("for a pipeline transformers 4 reads spiece.model, which the small model does not have")
    absent = dict.fromkeys(["safety_checker", "feature_extractor", "watermarker"])
    pipeline = IFSuperResolutionPipeline.from_pretrained(
        folder, local_files_only=True, requires_safety_checker=False, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_noise_augmentation_is_a_variance_with_the_nearest_level_of_the_schedule() -> None:
    assert [level_of(variance, COSINE) for variance in (1e-3, 1e-5)] == [13, 0]
    told = LowResolution(resolution=8, variance=1e-3, level=13).told(
        torch.zeros(1, 3, 8, 8), (600, 600), [torch.Generator().manual_seed(0)]
    )
    assert told["low_resolution"].var().item() == pytest.approx(1e-3, rel=0.01)
    assert told["noise_level"].tolist() == [13]


def test_low_resolution_pictures_are_those_of_a_file_as_the_pipeline_enlarges_them() -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = reduced(pixels, 16)
    grey = (small + 1) * 127.5
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-4)
    assert small.abs().max() <= 1
    assert torch.equal(enlarged(small, (32, 32)), interpolate(small, (32, 32), mode="bilinear", align_corners=True))


def test_loss_and_gradients_are_those_of_the_paper(fields: dict[str, object]) -> None:
    config = config_of(fields, training__train_batch_size=2, super_resolution__noise_augmentation=1e-3)
    model = model_of(config)
    batches = prepare(config, model, CPU, check_photos(config))
    denoiser, objective, _ = build_step(resolve(config), model, CPU)
    pipeline = pipeline_of(Path(config.model.base))
    theirs = pipeline.unet.train().requires_grad_(True)
    for step in range(2):
        (batch,) = batches.batches_at(step)
        noised = objective.noise(batch, step)
        told = objective.conditioning(batch, step)
        loss = objective.loss(denoiser.predict(noised.noisy_latents, noised.timesteps, told), noised).total
        loss.backward()
        draws = [generator(config.seed, STREAM, step, sample) for sample in batch.sample_ids.tolist()]
        noise = torch.stack([torch.randn(3, RESOLUTION, RESOLUTION, generator=each) for each in draws])
        large = interpolate(
            reduced(batch.latent_mean, IF_RESOLUTION), (RESOLUTION,) * 2, mode="bilinear", align_corners=True
        )
        beside = (1 - 1e-3) ** 0.5 * large + 1e-3**0.5 * noise
        embeds, _ = pipeline.encode_prompt("a zx dog", do_classifier_free_guidance=False)
        predicted = theirs(
            torch.cat([noised.noisy_latents, beside], dim=1), noised.timesteps, class_labels=torch.tensor([13, 13]),
            encoder_hidden_states=embeds.repeat(2, 1, 1),
        ).sample.chunk(2, dim=1)[0]  # fmt: skip
        expected = mse_loss(predicted, noised.target)
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        others = dict(theirs.named_parameters())
        for name, parameter in denoiser.module.named_parameters():
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-5, atol=1e-6, msg=name)
        denoiser.module.zero_grad()
        theirs.zero_grad()
    (again,) = batches.batches_at(0)
    first, second = (objective.conditioning(again, step).picture["low_resolution"] for step in (0, 1))
    assert torch.equal(first, objective.conditioning(again, 0).picture["low_resolution"])
    assert not torch.equal(first, second)


def test_enlarged_pictures_are_those_of_diffusers_pipeline(stage_2: Path) -> None:
    """At level 0 the pipeline's noise has the variance 4.1e-5; with that variance the pictures are the same."""
    model = find_model(str(stage_2))
    small = torch.rand(2, 3, IF_RESOLUTION, IF_RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt", "clean_caption": False}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    theirs = pipeline_of(stage_2)(
        prompt=["a dog"] * 2, image=small, generator=generators, noise_level=0, **options
    ).images
    how = LowResolution(resolution=IF_RESOLUTION, variance=1 - COSINE[0].item(), level=0)
    table = embed_prompts(model, load_text_encoders(model), ["a dog", ""])
    job = Job(
        prompts=["a dog"], size=(RESOLUTION, RESOLUTION), given=Given(pictures=small, low_resolution=how),
        generators=[torch.Generator().manual_seed(seed) for seed in (1, 2)], at_once=1,
    )  # fmt: skip
    artist = Artist(model=model, settings=SamplingSettings(sampler="ddpm", num_inference_steps=3, guidance_scale=4.0))
    denoiser = Denoiser(model.family, {"unet": model.load("unet")})
    ours = artist.latents(denoiser, table.conditioning(["a dog", ""]), job)
    torch.testing.assert_close(ours.clamp(-1, 1), torch.as_tensor(theirs).clamp(-1, 1), rtol=0, atol=2e-5)


def test_stages_are_trained_and_chained(run: Run, fields: dict[str, object], tmp_path: Path, stage_2: Path) -> None:
    noisier = fields | {"super_resolution.noise_augmentation": 1e-3}  # it is drawn as it was trained
    done = run("train", *(f"{field}={json.dumps(value)}" for field, value in noisier.items()))
    assert done.code == 0, done.err
    assert "lowmem-db generate FIRST_STAGE --upscale " in done.err
    final = tmp_path / "run" / "final"
    assert pipeline_of(final).scheduler.config["variance_type"] == "fixed_small"
    assert "noise_level=13" in (final / "README.md").read_text()
    (file,) = (final / "unet").glob("*.safetensors")
    before, after = load_file(stage_2 / "unet" / file.name), load_file(file)
    assert all(not torch.equal(before[name], weight) for name, weight in after.items())
    stage_1 = write_tiny_if(tmp_path / "stage_1")
    drawing = ["-p", "a zx dog", "--num-images", 2, "--num-inference-steps", 2]
    done = run("generate", stage_1, *drawing, "--upscale", tmp_path / "run", "-o", tmp_path / "drawn")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "drawn" / "00-00.png") as image:
        assert image.size == (RESOLUTION, RESOLUTION)
        assert to_pixels([image]).abs().max() <= 1
    (told,) = json.loads((tmp_path / "drawn" / "images.json").read_text())["upscale"]
    assert (told["noise_augmentation"], told["noise_level"], told["resolution"]) == (1e-3, 13, RESOLUTION)
    refused = run("generate", tmp_path / "run", *drawing, "-o", tmp_path / "none")
    assert (refused.code, "name the model that draws them, and this one as --upscale" in refused.err) == (2, True)
    refused = run("generate", stage_1, *drawing, "--upscale", stage_1, "-o", tmp_path / "none")
    assert (refused.code, "does not enlarge pictures" in refused.err) == (2, True)
    refused = run("generate", stage_1, *drawing, "--width", 32, "--upscale", tmp_path / "run", "-o", tmp_path / "none")
    assert (refused.code, "--upscale: enlarges squares, but --width 32 and --height 16" in refused.err) == (2, True)
    refused = run("evaluate", tmp_path / "run")
    assert (refused.code, "draws none itself; draw them (lowmem-db generate FIRST_STAGE" in refused.err) == (2, True)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(
    fields: dict[str, object], tmp_path: Path, kind: str
) -> None:
    chosen = fields | {"training.max_train_steps": 4, "checkpointing.every": 2, "training.train_batch_size": 2}
    chosen |= {"lora.enabled": True, "lora.rank": 2} if kind == "LoRA" else {"memory.checkpointing": "nested"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killing = kill_in_step(3, f"super-resolution, {kind}")
    assert run_in_child(chosen | {"output_dir": str(killed)}, killing) == -signal.SIGKILL
    assert run_in_child(chosen | {"output_dir": str(killed)}) == 0
    assert run_in_child(chosen | {"output_dir": str(whole)}) == 0
    assert final_bytes(killed) == final_bytes(whole)
    assert metric_rows(killed) == metric_rows(whole)


README = [
    "--instance_prompt=a sks dog", "--learning_rate=5e-6", "--max_train_steps=2000", "--train_batch_size=2",
    "--gradient_accumulation_steps=6", "--validation_prompt=a sks dog", "--validation_steps=150",
    "--checkpointing_steps=500", "--pre_compute_text_embeddings", "--tokenizer_max_length=77",
    "--text_encoder_use_attention_mask", "--validation_images", "one.png", "two.png",
    "--class_labels_conditioning", "timesteps",
]  # fmt: skip
"""The command of diffusers' documentation for the second stage, but for the hub and Weights & Biases."""


@pytest.mark.long
def test_command_of_diffusers_documentation_runs(
    run: Run, stage_2: Path, photos_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMEM_DB_CACHE", str(tmp_path / "cache"))
    here = [
        f"--pretrained_model_name_or_path={stage_2}", f"--instance_data_dir={photos_dir}", "--output_dir=out",
        f"--resolution={RESOLUTION}",
    ]  # fmt: skip
    done = run("train", "train_dreambooth.py", *here, *README, "training.max_train_steps=2")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "unet").is_dir()


def test_stage_that_is_not_fine_tuned_is_not_told_the_identifier() -> None:
    assert without_identifier("a zx dog, on the beach", "a zx dog", "a dog") == "a dog, on the beach"
    assert without_identifier("a photo of ZX.", "a zx dog", "a dog") == "a photo of"


def test_stage_that_is_not_fine_tuned_is_told_what_a_learned_word_began_as(
    tiny_fields: dict[str, object], stage_2: Path
) -> None:
    of_word = {"textual_inversion.enabled": True, "textual_inversion.token": "<z>", "subject.instance_prompt": "a <z>"}
    fields = tiny_fields | {"prior.enabled": False, "training.learning_rate": None} | of_word
    config = load_config(None, [pair for pair in fields.items() if pair[1] is not None])
    (stage,) = find_stages([str(stage_2)])
    assert stage.prompts(["a <z> in the snow", "a cat"], config) == [f"a {config.initializer} in the snow", "a cat"]


def test_guidance_is_that_of_the_pipeline_but_for_the_small_model(stage_2: Path) -> None:
    stages = find_stages([str(stage_2), "demo_if_ii"])
    assert [stage.settings.guidance_scale for stage in stages] == [4.0, 2.0]
    assert [stage.as_json()["guidance_scale"] for stage in stages] == [4.0, 2.0]


def test_plan_has_no_phase_that_draws(fields: dict[str, object]) -> None:
    config = config_of(fields)
    found = plan(config, target_of_device(config, CPU))
    assert [phase.name for phase in found.phases] == ["encode_images", "encode_text", "train"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior__enabled": True}, r"^prior\.enabled: true, .* set prior\.class_dir to a folder"),
        ({"sampling__prompts": ["a zx dog"]}, r"^sampling\.prompts: .* generate FIRST_STAGE --upscale RUN"),
        ({"super_resolution__low_resolution": 32}, r"^super_resolution\.low_resolution: 32 is not smaller than"),
        ({"data__aspect_ratio_buckets": True}, r"^data\.aspect_ratio_buckets: "),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_way_out(
    fields: dict[str, object], changes: dict[str, object], message: str
) -> None:
    config = config_of(fields, **changes)
    with pytest.raises(ConfigError, match=message):
        check_fits(config, model_of(config))


def test_other_models_do_not_enlarge(tiny_fields: dict[str, object]) -> None:
    config = config_of(tiny_fields, super_resolution__noise_augmentation=1e-3)
    with pytest.raises(ConfigError, match=r"^super_resolution: has no effect on Stable Diffusion"):
        check_fits(config, model_of(config))
