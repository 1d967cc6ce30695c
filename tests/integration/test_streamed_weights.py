"""Runs with streamed weights: files have the bytes of those of a run whose weights stay."""

import json
import threading
from pathlib import Path

import pytest
import torch

from lowmem_db.cli.train import train
from lowmem_db.engine.generate import generate_images
from lowmem_db.engine.source import find_source
from lowmem_db.memory import weight_stream
from lowmem_db.optimizers import build
from lowmem_db.sampling.latents import SamplingSettings
from tests.integration.test_resume import final_bytes, metric_rows

CPU = torch.device("cpu")
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
    "the average of 24-bit weights, samples of it": FULL
    | SAMPLES
    | {"ema.enabled": True, "memory.stream_optimizer_state": False},
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
QUICK = "24-bit weights, samples"
ON_HOST = {"memory.stream_weights": True, "memory.stream_optimizer_state": True, "memory.optimizer_step": "host"}
STEPPED_ON_HOST = (
    "24-bit weights, samples",
    "the average of 24-bit weights, samples of it",
    "buckets, stochastic rounding, nested checkpoints on the host, text encoder stopped",
    "fp16 autocast",
    "adamw",
    "adafactor",
    "chosen layers, some blocks",
)


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


def cache_bytes(output_dir: Path) -> dict[str, bytes]:
    """Return the class images, latents and embeddings of a run with a cache of its own."""
    cache = output_dir.parent / "cache"
    files = [file for file in sorted(cache.rglob("*")) if file.suffix in {".png", ".safetensors"}]
    return {str(file.relative_to(cache)): file.read_bytes() for file in files}


def drawn(output_dir: Path) -> list[bytes]:
    settings = SamplingSettings(sampler="ddim", num_inference_steps=2, guidance_scale=3.0)
    source = find_source(str(output_dir))
    assert source.streams_weights == ("streamed" in output_dir.parts)
    rows = generate_images(
        source, ["a zx dog"], settings, num_images=2, resolution=32, seed=1, device=CPU, dtype=torch.float32
    )
    return [image.tobytes() for _, images in rows for image in images]


def assert_same(one: Path, other: Path) -> None:
    assert metric_rows(one) == metric_rows(other)
    assert cache_bytes(one) == cache_bytes(other) != {}
    assert checkpoint_bytes(one) == checkpoint_bytes(other) != {}
    assert final_bytes(one) == final_bytes(other) != {}
    for grid in (one / "samples").glob("*/grid.png"):
        assert grid.read_bytes() == (other / grid.relative_to(one)).read_bytes()


def own_places(folder: Path) -> dict[str, object]:
    return {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")}


@pytest.mark.parametrize(
    "variant", [name if name == QUICK else pytest.param(name, marks=pytest.mark.long) for name in VARIANTS]
)
def test_runs_are_those_with_weights_that_stay(variant: str, tiny_fields: dict[str, object], tmp_path: Path) -> None:
    """Also if they are stepped on the host, where that can be."""
    fields = tiny_fields | {"checkpointing.every": 2, "prior.num_class_images": 2} | VARIANTS[variant]
    streamed = run(fields | {"memory.stream_weights": True} | own_places(tmp_path / "streamed"))
    resident = run(fields | own_places(tmp_path / "resident"))
    assert_same(streamed, resident)
    if "samples" in variant:
        assert (streamed / "samples" / "step-000004" / "grid.png").is_file()
        assert drawn(streamed) == drawn(resident)
    if variant in STEPPED_ON_HOST:
        assert_same(run(fields | ON_HOST | own_places(tmp_path / "on_host")), resident)
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("optimizer_step")]


@pytest.mark.long
@pytest.mark.parametrize("trains", [False, True])
def test_sdxl_too(trains: bool, tiny_fields: dict[str, object], tiny_sdxl: Path, tmp_path: Path) -> None:
    fields = tiny_fields | FULL | {"model.base": str(tiny_sdxl), "training.train_text_encoder": trains}
    fields |= {"training.max_train_steps": 2, "prior.num_class_images": 2}
    streamed = run(fields | {"memory.stream_weights": True} | own_places(tmp_path / "streamed"))
    assert_same(streamed, run(fields | own_places(tmp_path / "resident")))


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


@pytest.mark.long
def test_a_run_may_go_on_with_the_step_at_the_other_place(
    tiny_fields: dict[str, object], tmp_path: Path, capsys
) -> None:
    fields = tiny_fields | {"checkpointing.every": 2, "memory.stream_weights": True} | FULL
    whole = run(fields | {"output_dir": str(tmp_path / "whole" / "run")})
    for first, then in (("device", "host"), ("host", "device")):
        parts = fields | {"output_dir": str(tmp_path / first / "run")}
        run(parts | {"training.max_train_steps": 2, "memory.optimizer_step": first})
        found = run(parts | {"memory.optimizer_step": then}, resume=True)
        assert f"resume: memory.optimizer_step was '{first}', is now '{then}'" in "".join(capsys.readouterr())
        assert final_bytes(found) == final_bytes(whole)
        assert metric_rows(found) == metric_rows(whole)


@pytest.mark.long
def test_tiles_before_training_have_latents_of_their_own(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | FULL | {"training.max_train_steps": 1, "prior.num_class_images": 1}
    tiled = run(fields | {"memory.tiled_preparation": True} | own_places(tmp_path / "tiled"))
    whole = run(fields | own_places(tmp_path / "whole"))
    assert not cache_bytes(tiled).keys() & cache_bytes(whole).keys(), "keys differ"
