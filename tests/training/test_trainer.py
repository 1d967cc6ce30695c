"""What a run leaves behind, and how it stops on numbers that are not finite."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lowmem_db_kernels import unpack_extra_bits_eager
from torch import nn

from lowmem_db.adaptation import layers
from lowmem_db.adaptation import low_rank as lora
from lowmem_db.cli.train import train
from lowmem_db.config.loading import load_config
from lowmem_db.engine import draw
from lowmem_db.engine.step import train_step
from lowmem_db.errors import ConfigError, NonFiniteError, StorageError
from lowmem_db.models.finding import find_model
from lowmem_db.run import attempts, checks
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_state, read_tensors
from lowmem_db.training import trainer


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


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "fp16"])
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
    original = draw.sample_latents

    def recording(denoiser, sampler, *arguments, **options):
        if denoiser.device.type != "meta":  # the planner draws there
            seen.append(sampler.config["prediction_type"])
        return original(denoiser, sampler, *arguments, **options)

    monkeypatch.setattr(draw, "sample_latents", recording)
    changes = {"objective.prediction_type": "v_prediction", "sampling.prompts": ["a dog"]}
    train(arguments(tiny_fields | changes | {"sampling.num_inference_steps": 2}))
    assert seen == ["epsilon", "epsilon", "v_prediction"]  # class images come from the model before training
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


def test_checkpoint_is_saved_after_some_minutes(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | {"prior.enabled": False, "checkpointing.keep": None, "training.max_train_steps": 3}
    for minutes, steps in ((1e-9, [1, 2, 3]), (1e9, [3])):
        folder = tmp_path / str(minutes)
        train(arguments(fields | {"checkpointing.every_minutes": minutes, "output_dir": str(folder)}))
        assert RunFolder(folder).complete_steps() == steps


def test_weight_that_is_not_finite_is_not_kept(
    tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiling(denoiser, objective, optimizer, batches, step):
        output = train_step(denoiser, objective, optimizer, batches, step)
        if step == 3:
            denoiser.module.conv_out.bias.data[0] = float("nan")
        return output

    monkeypatch.setattr(trainer, "train_step", spoiling)
    with pytest.raises(
        NonFiniteError, match=r"step 4: unet: conv_out\.bias is infinite or NaN, so no checkpoint .*step-000002"
    ):
        train(arguments(tiny_fields | {"prior.enabled": False, "checkpointing.every": 2}))
    assert RunFolder(tmp_path / "run").complete_steps() == [2]
    assert not (tmp_path / "run" / "final").exists()


def test_full_disk_is_reported_before_the_run(tiny_fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.environment, "free_disk_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"output_dir: .* GiB are free; lower checkpointing\.keep"):
        train(arguments(tiny_fields))


def test_samples_come_from_the_moving_average(
    tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    seen: list[torch.Tensor] = []

    def recording(config, model, denoiser, prompts, *others):
        seen.append(denoiser.module.conv_in.weight.detach().clone())

    monkeypatch.setattr(attempts, "draw_samples", recording)
    fields = tiny_fields | {"sampling.prompts": ["a dog"], "training.max_train_steps": 1}
    train(arguments(fields))
    train(arguments(fields | {"ema.enabled": True, "output_dir": str(tmp_path / "ema")}))
    base = find_model(str(tiny_model)).load("unet").conv_in.weight
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
    said = run.config_file.read_text()
    assert all(each in said for each in ("weights: bf16_extra_bits", "clipping: update_rms", "mixed_precision: bf16"))
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


def test_final_model_of_an_average_is_the_average_as_it_is(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    changed = {"memory.stream_optimizer_state": False, "ema.enabled": True, "training.max_train_steps": 2}
    train(arguments(tiny_fields | ENGINE | changed))
    run = RunFolder(tmp_path / "run")
    average = read_state(run.checkpoint_dir(2) / "ema.safetensors")
    final, _ = read_tensors(run.final_dir / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, average[f"unet.{name}"]) for name, weight in final.items())
    assert any((weight != weight.bfloat16().float()).any() for weight in final.values())


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.long), 4])
def test_stopped_text_encoder_keeps_its_24_bits(tiny_fields: dict[str, object], tmp_path: Path, step: int) -> None:
    """Also where a run is resumed between its last checkpoint and its final model."""
    fields = tiny_fields | ENGINE | {"training.stop_text_encoder_training": step}
    train(arguments(fields))
    file = tmp_path / "run" / "final" / "text_encoder" / "model.safetensors"
    final, _ = read_tensors(file)
    assert any((weight != weight.bfloat16().float()).any() for weight in final.values())
    before = file.read_bytes()
    shutil.rmtree(tmp_path / "run" / "final")
    train(arguments(fields), resume=True)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 4 + 8),
        ({"optimizer.name": "adafactor"}, 4 + 0.1),
        ({"optimizer.name": "adamw8bit", "memory.weights": "bf16_extra_bits"}, 3 + 2.1),
        ({"optimizer.name": "adamw8bit", "memory.weights": "bf16_stochastic", "ema.enabled": True}, 2 + 2.1 + 4),
    ],
)
def test_disk_is_asked_for_what_a_checkpoint_takes(
    tiny_fields: dict[str, object], tiny_model: Path, fields: dict[str, object], expected: float
) -> None:
    model = find_model(str(tiny_model))
    config = load_config(None, list((tiny_fields | fields | {"training.max_train_steps": 1}).items()))
    whole = 4 * sum(model.num_parameters(name) for name in ("unet", "text_encoder", "vae"))
    of_checkpoints = checks.disk_bytes(config, model) - whole
    assert of_checkpoints == pytest.approx(2 * expected * model.num_parameters("unet"), abs=1)


def test_block_that_the_model_has_not_is_refused(tiny_fields: dict[str, object]) -> None:
    changed = {"memory.checkpointing": {"unet.down_blocks.7": "segments"}}
    with pytest.raises(ConfigError, match=r"memory\.checkpointing: .*unet\.down_blocks\.7.* is not a block; allowed:"):
        train(arguments(tiny_fields | changed))


LORA_FILES = {"pytorch_lora_weights.safetensors", "README.md", "checksums.json"}
LORA = {
    "lora.enabled": True,
    "lora.rank": 4,
    "lora.targets": ["attention", "feed_forward"],
    "training.train_text_encoder": True,
    "training.learning_rate": 1e-2,
}


@pytest.mark.parametrize("dora", [False, True])
def test_final_lora_in_a_fresh_pipeline_is_the_trained_model(
    tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path, dora: bool
) -> None:
    train(arguments(tiny_fields | LORA | {"lora.dora": dora}))
    run = RunFolder(tmp_path / "run")
    others = set() if dora else {"run-lora-kohya.safetensors"}
    assert {file.name for file in run.final_dir.iterdir()} == LORA_FILES | others
    counts = json.loads((run.root / "plan.json").read_text())["trained_parameters"]
    trained = read_state(run.checkpoint_dir(4) / "unet.safetensors")
    assert counts["unet"] == sum(tensor.numel() for tensor in trained.values())
    assert counts["total"] == counts["unet"] + counts["text_encoder"]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipeline.load_lora_weights(run.final_dir)
    for component, module in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        found = {
            name.replace(".default_0", "").removesuffix(".weight"): parameter
            for name, parameter in module.named_parameters()
            if ".lora_" in name
        }
        state = read_state(run.checkpoint_dir(4) / f"{component}.safetensors")
        expected = {name.removeprefix("text_model.").removesuffix(".weight"): value for name, value in state.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert any((tensor != 0).any() for name, tensor in expected.items() if "lora_B" in name), "nothing has trained"


def test_final_lora_of_an_average_is_the_average(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    train(arguments(tiny_fields | LORA | {"ema.enabled": True}))
    run = RunFolder(tmp_path / "run")
    final, metadata = read_tensors(run.final_dir / "pytorch_lora_weights.safetensors")
    average = read_state(run.checkpoint_dir(4) / "ema.safetensors")
    weights = read_state(run.checkpoint_dir(4) / "unet.safetensors")
    assert len(average) == len(final), "only what trains is averaged"
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A"
    assert torch.equal(final[f"unet.{name}.weight"], average[f"unet.{name}.default.weight"])
    assert not torch.equal(final[f"unet.{name}.weight"], weights[f"{name}.weight"])
    assert json.loads(metadata["lowmem_db_base"])["base"] == tiny_fields["model.base"]


def test_target_that_selects_nothing_stops_the_run(tiny_fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: 'unet\.middle\.\*' selects no layer"):
        train(arguments(tiny_fields | LORA | {"lora.targets": ["attention", "unet.middle.*"]}))


def test_quantized_weights_are_refused_on_the_cpu(tiny_fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.base_weights: 'nf4' needs a CUDA device.*fp32, fp16, bf16"):
        train(arguments(tiny_fields | LORA | {"lora.base_weights": "nf4"}))


@pytest.mark.parametrize("weights", ["fp32", "bf16_extra_bits"])
def test_layers_that_do_not_train_come_out_as_they_went_in(
    tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path, weights: str
) -> None:
    fields = {"training.layers": ["unet.*.attn2.*"], "memory.weights": weights}
    train(arguments(tiny_fields | fields))
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = read_tensors(tiny_model / file)[0], read_tensors(tmp_path / "run" / "final" / file)[0]
    for name, weight in before.items():
        # 24 bits of an fp32 weight: what is split and joined again differs in its last bits alone.
        torch.testing.assert_close(after[name], weight, atol=0, rtol=2**-15) if ".attn2." not in name else None
    assert all((before[name] != after[name]).any() for name in before if ".attn2.to_k." in name)
    counts = json.loads((tmp_path / "run" / "plan.json").read_text())["trained_parameters"]
    assert counts["total"] == sum(weight.numel() for name, weight in before.items() if ".attn2." in name)


def test_disk_of_a_lora_run_is_that_of_its_adapters(tiny_fields: dict[str, object], tiny_model: Path) -> None:
    model = find_model(str(tiny_model))
    config = load_config(None, list((tiny_fields | LORA).items()))
    modules: dict[str, nn.Module] = {"unet": model.load("unet"), "text_encoder": model.load("text_encoder")}
    lora.attach(modules, config.lora, seed=0)
    count = sum(layers.count_trained(modules).values())
    in_final = 2 * count  # for diffusers, and for other programs
    assert checks.disk_bytes(config, model) == 2 * 12 * count + 4 * in_final
