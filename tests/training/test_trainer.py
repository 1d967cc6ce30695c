"""What a run leaves behind, and how it stops on numbers that are not finite."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lowmem_db_kernels import unpack_extra_bits_eager

from lowmem_db.cli.train import train
from lowmem_db.errors import ConfigError, NonFiniteError, StorageError
from lowmem_db.models.loading import load_unet
from lowmem_db.models.source import find_model
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_state, read_tensors
from lowmem_db.training import samples, setup, trainer
from lowmem_db.training.step import train_step


def arguments(fields: dict[str, object]) -> list[str]:
    return [f"{field}={json.dumps(value)}" for field, value in fields.items()]


def test_run_folder_holds_what_it_shall(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | {
        "checkpointing.every": 2,
        "sampling.prompts": ["a zx dog", "a dog"],
        "sampling.num_images": 2,
        "sampling.num_inference_steps": 2,
        "logging.tensorboard": True,
    }
    train(arguments(fields))
    root = tmp_path / "run"
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) == {
        "step", "loss", "loss_instance", "loss_prior", "lr", "lr_text_encoder", "grad_norm", "seconds", "peak_bytes",
    }  # fmt: skip
    assert rows[0]["lr_text_encoder"] is None
    assert RunFolder(root).complete_steps() == [2, 4]
    assert sorted(file.name for file in (root / "samples" / "step-000004").iterdir()) == [
        "00-00.png", "00-01.png", "01-00.png", "01-01.png", "grid.png",
    ]  # fmt: skip
    assert (root / "samples" / "step-000002" / "grid.png").is_file()
    assert json.loads((root / "environment.json").read_text())["versions"]["torch"]
    assert any((root / "tensorboard").iterdir())
    assert "zx dog" in (root / "config.yaml").read_text()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_final_model_loads_in_diffusers(tiny_fields: dict[str, object], tmp_path: Path, precision: str) -> None:
    train(arguments(tiny_fields | {"training.train_text_encoder": True, "final.precision": precision}))
    final = tmp_path / "run" / "final"
    pipeline = StableDiffusionPipeline.from_pretrained(final, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a zx dog", num_inference_steps=2, height=32, width=32, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(image)).all()
    assert not list(final.rglob("*.bin"))


def test_changed_prediction_type_reaches_samples_and_final_model(
    tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = samples.sample_latents

    def recording(unet, noise_schedule, *arguments, **options):
        seen.append(noise_schedule.config["prediction_type"])
        return original(unet, noise_schedule, *arguments, **options)

    monkeypatch.setattr(samples, "sample_latents", recording)
    changes = {"objective.prediction_type": "v_prediction", "sampling.prompts": ["a dog"]}
    train(arguments(tiny_fields | changes | {"sampling.num_inference_steps": 2}))
    assert seen == ["v_prediction"]
    scheduler = json.loads((tmp_path / "run" / "final" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_non_finite_loss_stops_the_run_and_names_the_last_good_checkpoint(
    tiny_fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(denoiser, objective, optimizer, batches, step):
        if step == 3:
            batches[0].latent_mean[0] = float("inf")
        return train_step(denoiser, objective, optimizer, batches, step)

    monkeypatch.setattr(trainer, "train_step", breaking)
    with pytest.raises(
        NonFiniteError, match=r"step 4: the loss of photo\d\.png.*last good checkpoint is .*step-000002"
    ):
        train(arguments(tiny_fields | {"checkpointing.every": 2}))


def test_full_disk_is_reported_before_the_run(tiny_fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.environment, "free_disk_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"output_dir: .* GiB are free; lower checkpointing\.keep"):
        train(arguments(tiny_fields))


def test_samples_come_from_the_moving_average(
    tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    seen: list[torch.Tensor] = []

    def recording(config, model, denoiser, prompts, run, step):
        seen.append(denoiser.unet.conv_in.weight.detach().clone())

    monkeypatch.setattr(setup, "draw_samples", recording)
    fields = tiny_fields | {"sampling.prompts": ["a dog"], "training.max_train_steps": 1}
    train(arguments(fields))
    train(arguments(fields | {"ema.enabled": True, "output_dir": str(tmp_path / "ema")}))
    base = load_unet(find_model(str(tiny_model))).conv_in.weight
    weights, average = seen
    torch.testing.assert_close(average, base.lerp(weights, 1 - 2 / 11))  # the decay of step 1 is (1 + 1) / (10 + 1)


ENGINE = {
    "optimizer.name": "adamw8bit",
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "memory.stream_optimizer_state": True,
    "memory.checkpointing": "segments",
    "training.train_text_encoder": True,
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_final_model_of_24_bit_weights_has_all_their_bits(
    tiny_fields: dict[str, object], tmp_path: Path, precision: str
) -> None:
    train(arguments(tiny_fields | ENGINE | {"final.precision": precision}))
    run = RunFolder(tmp_path / "run")
    checkpoint = run.checkpoint_dir(4)
    extra_bits = read_state(checkpoint / "optimizer.safetensors")["parameters"]
    final, _ = read_tensors(run.final_dir / "unet" / "diffusion_pytorch_model.safetensors")
    trained = read_state(checkpoint / "unet.safetensors")
    assert trained.keys() == final.keys()
    differing = 0
    for name, weight in trained.items():
        assert weight.dtype == torch.bfloat16
        whole = unpack_extra_bits_eager(weight, extra_bits[f"unet.{name}"]["extra_bits"])
        assert torch.equal(final[name], whole if precision == "fp32" else weight), name
        differing += int((whole != weight.float()).sum())
    assert differing > 10_000
    pipeline = StableDiffusionPipeline.from_pretrained(run.final_dir, local_files_only=True)
    assert torch.equal(pipeline.unet.conv_in.weight.detach().float(), final["conv_in.weight"].float())


def test_kind_of_weights_and_clipping_are_in_the_run_s_configuration(
    tiny_fields: dict[str, object], tmp_path: Path
) -> None:
    train(arguments(tiny_fields | ENGINE))
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "weights: bf16_extra_bits" in text
    assert "clipping: update_rms" in text
    assert "mixed_precision: bf16" in text


def test_block_that_the_model_has_not_is_refused(tiny_fields: dict[str, object]) -> None:
    changed = {"memory.checkpointing": {"unet.down_blocks.7": "segments"}}
    with pytest.raises(
        ConfigError, match=r"memory\.checkpointing: .*unet\.down_blocks\.7.* is no block; the blocks are"
    ):
        train(arguments(tiny_fields | changed))
