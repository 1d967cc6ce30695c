"""Runs with streamed weights: files have the bytes of those of a run whose weights stay."""

import json
from pathlib import Path

import pytest
import torch

from lowmem_db.cli.train import train
from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import resolve
from lowmem_db.memory import weight_stream
from lowmem_db.models.finding import model_of
from lowmem_db.models.loading import CPU
from lowmem_db.optimizers import build
from lowmem_db.preparation.class_images import load_frozen_denoiser, prepare_class_images
from tests.integration.test_resume import final_bytes, metric_rows

FULL = {
    "optimizer.name": "adamw8bit",
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "memory.stream_optimizer_state": True,
    "memory.checkpointing": "segments",
    "training.train_text_encoder": True,
}
SAMPLES = {"sampling.prompts": ["a zx dog"], "sampling.num_images": 2, "sampling.num_inference_steps": 2}
LORA = {
    "lora.enabled": True,
    "lora.rank": 2,
    "lora.dropout": 0.2,
    "training.train_text_encoder": True,
    "training.gradient_accumulation_steps": 2,
    "memory.checkpointing": "segments",
}
VARIANTS = {
    "24-bit weights, samples": FULL | SAMPLES,
    "LoRA, dropout, two batches a step": LORA | SAMPLES,
    "buckets, stochastic rounding, nested checkpoints on the host, text encoder stopped": FULL
    | {
        "memory.weights": "bf16_stochastic",
        "memory.checkpointing": "nested",
        "memory.offload_checkpoints": True,
        "training.stop_text_encoder_training": 2,
        "data.aspect_ratio_buckets": True,
        "data.bucket_step": 8,
        "data.min_bucket_side": 16,
        "data.max_bucket_side": 64,
    },
    "fp16 autocast": FULL | {"memory.weights": "fp32", "training.mixed_precision": "fp16"},
    "adamw": FULL | {"memory.weights": "fp32", "optimizer.name": "adamw", "memory.stream_optimizer_state": False},
    "adafactor": FULL | {"memory.weights": "bf16_extra_bits", "optimizer.name": "adafactor"},
    "chosen layers, some blocks": FULL
    | {
        "training.layers": ["unet.*.attn*", "text_encoder.*.mlp.*"],
        "memory.checkpointing": {"unet.mid_block": "segments", "unet.up_blocks.0": "nested"},
    },
    "DoRA, text encoder stopped": LORA | {"lora.dora": True, "training.stop_text_encoder_training": 2},
    "textual inversion": {
        "subject.instance_prompt": "a <z>",
        "subject.class_prompt": "a d",
        "textual_inversion.enabled": True,
        "textual_inversion.token": "<z>",
        "prior.enabled": False,
        "training.learning_rate": 5e-6,
        "memory.checkpointing": "segments",
    },
}
QUICK = ("24-bit weights, samples", "LoRA, dropout, two batches a step")


@pytest.fixture(autouse=True)
def _tiny_weights_stream_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "MIN_NUMEL", 64)
    monkeypatch.setattr(build, "_LARGEST_SMALL", 63)


def run(fields: dict[str, object], *, resume: bool = False) -> Path:
    train([f"{field}={json.dumps(value)}" for field, value in fields.items()], resume=resume)
    return Path(str(fields["output_dir"]))


def checkpoint_bytes(output_dir: Path) -> dict[str, bytes]:
    files = sorted((output_dir / "checkpoints").rglob("*.safetensors"))
    return {str(file.relative_to(output_dir)): file.read_bytes() for file in files}


def assert_same(one: Path, other: Path, fields: dict[str, object]) -> None:
    assert metric_rows(one) == metric_rows(other)
    assert checkpoint_bytes(one) == checkpoint_bytes(other) != {}
    assert final_bytes(one) == final_bytes(other) != {}
    if fields.get("sampling.prompts"):
        grid = "samples/step-000004/grid.png"
        assert (one / grid).read_bytes() == (other / grid).read_bytes()


@pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in VARIANTS]
)
def test_runs_are_those_with_weights_that_stay(variant: str, tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | {"checkpointing.every": 2} | VARIANTS[variant]
    streamed = run(fields | {"memory.stream_weights": True, "output_dir": str(tmp_path / "streamed" / "run")})
    resident = run(fields | {"output_dir": str(tmp_path / "resident" / "run")})
    assert_same(streamed, resident, fields)


@pytest.mark.long
def test_a_run_may_go_on_with_weights_that_stay(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | {"checkpointing.every": 2} | FULL
    whole = run(fields | {"output_dir": str(tmp_path / "whole" / "run")})
    for first in (True, False):
        parts = fields | {"output_dir": str(tmp_path / str(first) / "run")}
        run(parts | {"training.max_train_steps": 2, "memory.stream_weights": first})
        found = run(parts | {"memory.stream_weights": not first}, resume=True)
        assert final_bytes(found) == final_bytes(whole)
        assert metric_rows(found) == metric_rows(whole)


def test_class_images_are_those_of_weights_that_stay(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    drawn = []
    for streams in (True, False):
        own = {"cache_dir": str(tmp_path / str(streams)), "memory.stream_weights": streams, "prior.num_class_images": 2}
        config = load_config(None, list((tiny_fields | FULL | own).items()))
        config, model = resolve(config), model_of(config)
        denoiser = load_frozen_denoiser(config, model, CPU, torch.float32)
        assert hasattr(denoiser.module, weight_stream.SLOTS) == streams
        (images,) = prepare_class_images(config, model, CPU, {(32, 32): 2})
        assert images.files is not None
        drawn.append([file.read_bytes() for file in images.files])
    assert drawn[0] == drawn[1]
