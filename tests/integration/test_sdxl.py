"""The whole road of SDXL on a tiny model: told what diffusers tells it, trained, killed, resumed, drawn, loaded."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch.nn.functional import mse_loss

from lowmem_db.cli.train import train
from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import resolve
from lowmem_db.engine.build import build_step
from lowmem_db.engine.draw import Artist, Job
from lowmem_db.engine.generate import generate_images
from lowmem_db.engine.source import find_source
from lowmem_db.errors import ConfigError
from lowmem_db.evaluation.folders import Limits
from lowmem_db.evaluation.protocol import Drawing, PromptChoice, Shard, draw_runs, find_runs
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import load_noise_schedule
from lowmem_db.preparation import encode
from lowmem_db.preparation.prepare import check_photos, prepare
from lowmem_db.run.checks import disk_bytes
from lowmem_db.sampling.latents import SamplingSettings
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_tensors
from tests.evaluation.test_protocol import write_run
from tests.integration.test_resume import final_bytes, kill_in_step, kill_in_write, metric_rows, run_in_child

CPU = torch.device("cpu")
BOTH = {
    "training.train_text_encoder": True,
    "training.learning_rate_text_encoder": 5e-4,
    "training.learning_rate_text_encoder_2": 2e-4,
}


@pytest.fixture
def fields(tiny_fields: dict[str, object], tiny_sdxl: Path) -> dict[str, object]:
    return tiny_fields | {"model.base": str(tiny_sdxl), "checkpointing.every": 2, "prior.num_class_images": 2}


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> ModelFolder:
    return find_model(str(tiny_sdxl))


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(fields: dict[str, object]) -> list[str]:
    return [f"{field}={json.dumps(value)}" for field, value in fields.items()]


@pytest.mark.parametrize("trains", [False, True])
def test_conditioning_and_loss_are_those_of_diffusers(
    fields: dict[str, object], model: ModelFolder, pipeline: StableDiffusionXLPipeline, trains: bool
) -> None:
    assert model.load("tokenizer_2").pad_token_id == 0
    chosen = fields | ({"training.train_text_encoder": True} if trains else {})
    config = load_config(None, list((chosen | {"training.train_batch_size": 3}).items()))
    batches = prepare(config, model, CPU, check_photos(config))
    (batch,) = batches.batches_at(0)
    denoiser, objective, _ = build_step(resolve(config), model, CPU)
    noised = objective.noise(batch, 0)
    with torch.no_grad():
        ours = denoiser.predict(noised.noisy_latents, noised.timesteps, batch.conditioning)
        prompts = ["a zx dog"] * 3 + ["a dog"] * 3
        together = [prompts] if trains else [[prompt] for prompt in prompts]  # frozen encoders see a prompt once
        encoded = [pipeline.encode_prompt(some, device=CPU, do_classifier_free_guidance=False) for some in together]
        embeds, pooled = (torch.cat(parts) for parts in list(zip(*encoded, strict=True))[::2])
        sizes = [tuple(map(int, row)) for row in batch.conditioning.picture["time_ids"]]
        time_ids = torch.cat(
            [
                pipeline._get_add_time_ids(
                    row[:2], row[2:4], row[4:], torch.float32, text_encoder_projection_dim=pooled.shape[-1]
                )
                for row in sizes
            ]
        )
        added = {"text_embeds": pooled, "time_ids": time_ids}
        theirs = pipeline.unet(
            noised.noisy_latents, noised.timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added
        ).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    expected = mse_loss(theirs[:3], noised.target[:3]) + mse_loss(theirs[3:], noised.target[3:])
    assert objective.loss(ours, noised).total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sizes_and_crops_are_recorded_with_the_latents(fields: dict[str, object], model: ModelFolder) -> None:
    config = load_config(None, list((fields | {"data.crop": "center"}).items()))
    batches = prepare(config, model, CPU, check_photos(config))
    square, wide, high = (image.picture["time_ids"].tolist() for image in batches.instance_images)
    assert square == [[96, 96, 0, 0, 32, 32]]
    assert wide == [[80, 120, 0, 8, 32, 32]]  # 48 x 32 once resized: 8 pixels are left of the crop
    assert high == [[128, 80, 10, 0, 32, 32]]  # 32 x 51.2: 9.6 above it
    assert all(image.picture["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] for image in batches.class_images)
    again = prepare(config, model, CPU, check_photos(config))
    assert all(
        torch.equal(one.picture["time_ids"], other.picture["time_ids"])
        for one, other in zip(batches.instance_images, again.instance_images, strict=True)
    )


def test_embeddings_of_frozen_text_encoders_are_made_once(
    fields: dict[str, object], model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, list(fields.items()))
    first = prepare(config, model, CPU, check_photos(config)).prompts
    monkeypatch.setattr(encode, "load_encoders_of_text", lambda *_: pytest.fail("the text encoders were loaded again"))
    second = prepare(config, model, CPU, check_photos(config)).prompts
    assert first.embeds is not None
    assert second.embeds is not None
    assert first.embeds.keys() == second.embeds.keys() == {"", "a zx dog", "a dog"}
    for prompt, rows in first.embeds.items():
        assert rows.keys() == {"embeds", "pooled"}
        assert all(torch.equal(tensor, second.embeds[prompt][name]) for name, tensor in rows.items())


@pytest.mark.parametrize("zeroes", [False, True])
def test_drawn_latents_are_those_of_the_pipeline(
    model: ModelFolder, pipeline: StableDiffusionXLPipeline, zeroes: bool
) -> None:
    """With the empty prompt as zeros, and as a prompt: ``force_zeros_for_empty_prompt``."""
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeroes)
    table = find_source(str(model.path)).embed(["a dog", ""], CPU, torch.float32)
    table = replace(table, zeroes_empty_prompt=zeroes)
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(3))
    pipeline.scheduler = DDIMScheduler.from_config(load_noise_schedule(model).config)
    theirs = pipeline(
        "a dog", height=32, width=48, latents=latents, num_inference_steps=3, guidance_scale=4.0, output_type="latent"
    ).images
    artist = Artist(
        model=model,
        settings=SamplingSettings(sampler="ddim", num_inference_steps=3, guidance_scale=4.0),
    )
    job = Job(prompts=["a dog"], size=(32, 48), generators=[torch.Generator().manual_seed(3)])
    ours = artist.latents(Denoiser(model.family, {"unet": model.load("unet")}), table.conditioning(["a dog", ""]), job)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropped_prompts_are_zeros_where_the_model_was_trained_so(
    fields: dict[str, object], model: ModelFolder
) -> None:
    for trains in (False, True):
        chosen = fields | {"objective.conditioning_dropout": 1.0, "training.train_text_encoder": trains}
        config = load_config(None, list(chosen.items()))
        (batch,) = prepare(config, model, CPU, check_photos(config)).batches_at(0)
        denoiser, _, _ = build_step(resolve(config), model, CPU)
        told = denoiser.told(batch.conditioning)
        assert not told.embeds["embeds"].any()
        assert not told.embeds["pooled"].any()
        assert told.picture["time_ids"].any()


VARIANTS = {
    "both text encoders, average, samples": BOTH
    | {
        "ema.enabled": True, "sampling.prompts": ["a zx dog"], "sampling.num_images": 1,
        "sampling.num_inference_steps": 2, "training.stop_text_encoder_training": 3,
    },
    "frozen text encoders, dropout": {"objective.conditioning_dropout": 0.4},
    "24-bit weights in backward": BOTH
    | {
        "optimizer.name": "adamw8bit", "memory.weights": "bf16_extra_bits", "memory.optimizer_in_backward": True,
        "memory.stream_optimizer_state": True, "memory.checkpointing": "segments",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "kill"),
    [
        pytest.param("both text encoders, average, samples", kill_in_step(3, "SDXL"), marks=pytest.mark.long),
        pytest.param("frozen text encoders, dropout", kill_in_write(9, "SDXL"), marks=pytest.mark.long),
        ("24-bit weights in backward", kill_in_step(2, "SDXL")),
    ],
)
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(
    fields: dict[str, object], tmp_path: Path, variant: str, kill: Callable[[], None]
) -> None:
    chosen = fields | VARIANTS[variant]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_in_child(chosen | {"output_dir": str(killed)}, kill) == -signal.SIGKILL
    assert run_in_child(chosen | {"output_dir": str(killed)}) == 0
    assert run_in_child(chosen | {"output_dir": str(whole)}) == 0
    assert final_bytes(killed) == final_bytes(whole)
    assert metric_rows(killed) == metric_rows(whole)


def test_final_model_is_a_pipeline_with_the_published_names(
    fields: dict[str, object], tiny_sdxl: Path, tmp_path: Path
) -> None:
    train(arguments(fields | BOTH))
    final = RunFolder(tmp_path / "run").final_dir
    for component in ("unet", "text_encoder", "text_encoder_2"):
        (file,) = (tiny_sdxl / component).glob("*.safetensors")
        before, after = read_tensors(file)[0], read_tensors(final / component / file.name)[0]
        assert before.keys() == after.keys()
        unchanged = {name for name in before if torch.equal(before[name], after[name])}
        of_last_layer = {
            name for name in before if name.startswith(("text_model.encoder.layers.1.", "text_model.final_layer_norm."))
        }  # the denoiser gets the hidden states before it
        assert unchanged == (of_last_layer if component == "text_encoder" else set())
    names = read_tensors(final / "text_encoder_2" / "model.safetensors")[0].keys()
    assert "text_projection.weight" in names
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    loaded = StableDiffusionXLPipeline.from_pretrained(final, local_files_only=True)
    assert loaded.config["force_zeros_for_empty_prompt"] is True
    loaded.set_progress_bar_config(disable=True)
    picture = loaded("a zx dog", num_inference_steps=2, height=32, width=32, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(picture)).all()
    rows = metric_rows(tmp_path / "run")
    assert [(row["lr"], row["lr_text_encoder"], row["lr_text_encoder_2"]) for row in rows] == [(1e-3, 5e-4, 2e-4)] * 4


def test_run_and_its_checkpoint_draw_the_same(fields: dict[str, object], tmp_path: Path) -> None:
    train(arguments(fields | BOTH | {"ema.enabled": True}))

    def draw() -> bytes:
        settings = SamplingSettings(sampler="ddim", num_inference_steps=2, guidance_scale=5.0)
        source = find_source(str(tmp_path / "run"))
        rows = generate_images(
            source, ["a zx dog"], settings, num_images=1, resolution=32, seed=0, device=CPU, dtype=torch.float32
        )
        return rows[0][1][0].tobytes()

    whole = draw()
    RunFolder(tmp_path / "run").final_dir.rename(tmp_path / "moved")
    assert draw() == whole


def test_disk_is_asked_for_both_text_encoders(fields: dict[str, object], model: ModelFolder) -> None:
    config = load_config(None, list((fields | BOTH | {"training.max_train_steps": 1}).items()))
    trained = sum(model.num_parameters(name) for name in ("unet", "text_encoder", "text_encoder_2"))
    whole = trained + model.num_parameters("vae")
    assert disk_bytes(config, model) == 2 * 12 * trained + 4 * whole


def test_learning_rate_of_a_text_encoder_that_is_not_there(tiny_fields: dict[str, object], tiny_model: Path) -> None:
    config = load_config(None, list((tiny_fields | BOTH).items()))
    with pytest.raises(ConfigError, match=r"training\.learning_rate_text_encoder_2: 0\.0002 has no effect on Stable"):
        build_step(resolve(config), find_model(str(tiny_model)), CPU)


def test_evaluation_draws_from_a_run(fields: dict[str, object], tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "rex", fields, tiny_sdxl)
    runs = find_runs(folder, PromptChoice(), Limits())
    drawing = Drawing(
        num_inference_steps=1, num_prompts=2, num_images=1, num_class_images=1, device=CPU, dtype=torch.float32
    )
    assert draw_runs(runs, tmp_path / "drawn", drawing, Shard()) == 0
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 3
