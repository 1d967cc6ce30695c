"""A run that is killed at any moment and resumed ends bit for bit where the uninterrupted one ends.

Every run is a child process that ends with SIGKILL where the test says so. The points are drawn at random; the seed
stands in the message of a failing test.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_db import randomness
from lowmem_db.cli.train import train
from lowmem_db.errors import CheckpointError
from lowmem_db.memory import weight_stream
from lowmem_db.optimizers import build
from lowmem_db.run.model_card import CARD_FILE
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_tensors
from lowmem_db.training import trainer as trainer_module
from tests.faults import note

STEPS = 8
MOVING = {
    "training.max_train_steps": STEPS,
    "training.gradient_accumulation_steps": 2,
    "training.lr_scheduler": "cosine",
    "training.lr_warmup_steps": 2,
    "training.train_text_encoder": True,
    "training.learning_rate_text_encoder": 5e-4,
    "checkpointing.every": 3,
    "objective.noise_offset": 0.1,
    "objective.conditioning_dropout": 0.2,
}
VARIANTS = {
    "adamw": {},
    "adamw8bit": {"optimizer.name": "adamw8bit"},
    "ema, text encoder stopped": {"ema.enabled": True, "training.stop_text_encoder_training": 4},
    "frozen text encoder, no prior, samples": {
        "training.train_text_encoder": False,
        "training.learning_rate_text_encoder": None,
        "prior.enabled": False,
        "sampling.prompts": ["a zx dog"],
        "sampling.num_images": 1,
        "sampling.num_inference_steps": 2,
    },
    "gradient checkpointing, fp16 autocast": {
        "memory.checkpointing": "layers",
        "training.mixed_precision": "fp16",
    },
}
_IN_BACKWARD = {
    "optimizer.name": "adamw8bit",
    "memory.optimizer_in_backward": True,
    "training.gradient_accumulation_steps": 1,
}
VARIANTS |= {
    "in backward, clipped by past norms": _IN_BACKWARD | {"training.clipping": "lagged"},
    "24-bit weights, streamed": _IN_BACKWARD
    | {"memory.weights": "bf16_extra_bits", "memory.stream_optimizer_state": True, "memory.checkpointing": "segments"},
    "stochastic rounding, streamed, text encoder stopped": _IN_BACKWARD
    | {
        "memory.weights": "bf16_stochastic",
        "memory.stream_optimizer_state": True,
        "training.stop_text_encoder_training": 4,
    },
    "24-bit weights and their average, text encoder stopped": _IN_BACKWARD
    | {"memory.weights": "bf16_extra_bits", "ema.enabled": True, "training.stop_text_encoder_training": 4},
    "fp16 autocast, finite check per parameter": _IN_BACKWARD | {"training.mixed_precision": "fp16"},
    "adafactor, nested checkpoints on the host": _IN_BACKWARD
    | {
        "optimizer.name": "adafactor",
        "memory.weights": "bf16_extra_bits",
        "memory.checkpointing": "nested",
        "memory.offload_checkpoints": True,
    },
    "24-bit weights, streamed with their states, text encoder stopped": _IN_BACKWARD
    | {
        "memory.weights": "bf16_extra_bits",
        "memory.stream_optimizer_state": True,
        "memory.stream_weights": True,
        "memory.checkpointing": "nested",
        "training.stop_text_encoder_training": 4,
    },
    "24-bit weights, stepped on the host, past norms": _IN_BACKWARD
    | {
        "memory.weights": "bf16_extra_bits",
        "memory.stream_optimizer_state": True,
        "memory.stream_weights": True,
        "memory.optimizer_step": "host",
        "memory.checkpointing": "segments",
        "training.clipping": "lagged",
    },
    "adamw in backward": {"memory.optimizer_in_backward": True, "training.gradient_accumulation_steps": 1},
}
_LORA = {"lora.enabled": True, "lora.rank": 2, "lora.dropout": 0.2, "lora.targets": ["attention", "convolutions"]}
VARIANTS |= {
    "LoRA, frozen text encoder, average, samples": _LORA
    | {
        "training.train_text_encoder": False,
        "training.learning_rate_text_encoder": None,
        "ema.enabled": True,
        "memory.checkpointing": "segments",
        "sampling.prompts": ["a zx dog"],
        "sampling.num_images": 1,
        "sampling.num_inference_steps": 2,
    },
    "LoRA beside streamed weights, samples": _LORA
    | {
        "memory.checkpointing": "segments",
        "memory.stream_weights": True,
        "sampling.prompts": ["a zx dog"],
        "sampling.num_images": 1,
        "sampling.num_inference_steps": 2,
    },
    "DoRA, text encoder stopped": _LORA
    | {"lora.dora": True, "lora.targets": ["attention"], "training.stop_text_encoder_training": 4},
    "LoRA beside fp16, 8-bit in backward": _IN_BACKWARD
    | _LORA
    | {"lora.base_weights": "fp16", "lora.targets": ["attention"]},
    "chosen layers, 24-bit weights": _IN_BACKWARD
    | {"memory.weights": "bf16_extra_bits", "training.layers": ["unet.*.attn*", "text_encoder.*.mlp.*"]},
}
VARIANTS |= {
    "textual inversion, average, samples": {
        "subject.instance_prompt": "a <z>",
        "subject.class_prompt": "a d",
        "textual_inversion.enabled": True,
        "textual_inversion.token": "<z>",
        "prior.enabled": False,
        "training.learning_rate": 5e-6,
        "training.train_text_encoder": False,
        "training.learning_rate_text_encoder": None,
        "ema.enabled": True,
        "memory.checkpointing": "layers",
        "sampling.prompts": ["a <z>"],
        "sampling.num_images": 1,
        "sampling.num_inference_steps": 2,
    },
}
_SCORED = {
    "evaluation.every": 2,
    "evaluation.keep_best": True,
    "checkpointing.keep": 1,
    "ema.enabled": True,
    "sampling.num_images": 1,
    "sampling.num_inference_steps": 2,
}
VARIANTS |= {
    "evaluation, best checkpoint, average": _SCORED,
    "evaluation, DoRA, best checkpoint, text encoder stopped": _SCORED
    | _LORA
    | {"lora.dora": True, "lora.targets": ["attention"], "training.stop_text_encoder_training": 4},
}
KILLS_PER_VARIANT = int(os.environ.get("LOWMEM_DB_KILLS", "2"))
# Most of these is in another variant too; `make long` runs them.
QUICK = ("adamw8bit", "24-bit weights, streamed", "textual inversion, average, samples")


def die(variant: str, place: str) -> None:
    """Kill this process; a run may end before it gets here."""
    note(attack="kill", variant=variant, place=place)
    os.kill(os.getpid(), signal.SIGKILL)


def place_of(file: Path) -> str:
    """Return what a write is part of, as in ``cache/class_images`` or ``checkpoints``."""
    for root in ("cache", "run"):
        if root in file.parts:
            inside = file.parts[file.parts.index(root) + 1 :]
            named = re.sub(r"^\.|\.\d+\.tmp.*$", "", inside[0]) if inside else "itself"
            return f"cache/{named}" if root == "cache" else named
    return "elsewhere"


def kill_in_step(step: int, variant: str = "") -> Callable[[], None]:
    """Return what makes the process kill itself in the middle of a step: gradients are there, weights untouched."""

    def install() -> None:
        original = trainer_module.train_step

        def killing(*arguments):
            if arguments[-1] == step:
                arguments[2].step_and_read = lambda *given: die(variant, "step")
            return original(*arguments)

        trainer_module.train_step = killing

    return install


def kill_in_write(number: int, variant: str = "") -> Callable[[], None]:
    """Return what makes the process kill itself at the n-th flush to disk: inside a checkpoint, a cache or final/."""

    def install() -> None:
        original, count = os.fsync, [0]

        def killing(descriptor: int) -> None:
            count[0] += 1
            if count[0] == number:
                die(variant, place_of(Path(f"/proc/self/fd/{descriptor}").resolve()))
            original(descriptor)

        os.fsync = killing

    return install


def run_in_child(fields: dict[str, object], install: Callable[[], None] = lambda: None) -> int:
    """Train in a child process; return its exit code, or minus the signal that killed it."""

    def main() -> None:
        install()
        train([f"{field}={json.dumps(value)}" for field, value in fields.items()], resume=True)

    child = multiprocessing.get_context("fork").Process(target=main)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def final_bytes(output_dir: Path) -> dict[str, bytes]:
    """Return the files of ``final/`` but for the card, which names its path, and the list of checksums."""
    final = output_dir / "final"
    files = [file for file in sorted(final.rglob("*")) if file.is_file()]
    kept = [file for file in files if file.name not in (CARD_FILE, "checksums.json")]
    return {str(file.relative_to(final)): file.read_bytes() for file in kept}


def metric_rows(output_dir: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in {"seconds", "peak_bytes"}} for row in rows]


@pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in VARIANTS]
)
def test_killed_runs_end_bit_for_bit_as_uninterrupted_ones(
    variant: str, tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = tiny_fields | MOVING | VARIANTS[variant]
    if fields.get("memory.stream_weights"):  # nearly all weights of a model as tiny as this one
        monkeypatch.setattr(weight_stream, "MIN_NUMEL", 64)
        monkeypatch.setattr(build, "_LARGEST_SMALL", 63)
    whole = tmp_path / "whole" / "run"
    writes = count_writes(fields | {"output_dir": str(whole)})
    assert [row["step"] for row in metric_rows(whole)] == list(range(1, STEPS + 1))

    seed = random.SystemRandom().randrange(1 << 32)
    draw = random.Random(seed)
    for number in range(KILLS_PER_VARIANT // 2):
        killed = tmp_path / f"killed-{number}" / "run"
        own = fields | {"output_dir": str(killed), "cache_dir": str(killed.parent / "cache")}
        write, step = draw.randrange(1, writes), draw.randrange(STEPS)
        at = f"{variant}, seed {seed}, round {number}: killed in write {write} and step {step}"
        for kill in (kill_in_write(write, variant), kill_in_step(step, variant)):
            assert run_in_child(own, kill) in {0, -signal.SIGKILL}, at
        assert run_in_child(own) == 0, at
        assert_same_end(killed, whole, fields, at)


def assert_same_end(killed: Path, whole: Path, fields: dict[str, object], at: str) -> None:
    """Compare two runs, file by file and row by row."""
    found, expected = final_bytes(killed), final_bytes(whole)
    assert found.keys() == expected.keys(), at
    for name, content in expected.items():
        assert found[name] == content, f"{name} differs; {at}"
    assert metric_rows(killed) == metric_rows(whole), at
    if fields.get("evaluation.every"):
        scores = RunFolder(whole).scores_file.read_bytes()
        assert len(scores.splitlines()) == STEPS // 2
        assert RunFolder(killed).scores_file.read_bytes() == scores, at
    if fields.get("sampling.prompts"):
        grid = "samples/step-000008/grid.png"
        assert (killed / grid).read_bytes() == (whole / grid).read_bytes(), at


def count_writes(fields: dict[str, object]) -> int:
    """Train to the end in a child process and return how often it flushed to the disk."""
    counter = multiprocessing.get_context("fork").Value("i", 0)

    def install() -> None:
        original = os.fsync

        def counting(descriptor: int) -> None:
            counter.value += 1
            original(descriptor)

        os.fsync = counting

    assert run_in_child(fields, install) == 0
    return counter.value


def test_the_weights_of_the_variants_move(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    """Equality above would also hold for runs that train nothing."""
    fields = tiny_fields | MOVING
    run_in_child(fields | {"output_dir": str(tmp_path / "a")})
    for component in ("unet", "text_encoder"):
        trained = next((tmp_path / "a" / "final" / component).glob("*.safetensors"))
        base = next((Path(str(tiny_fields["model.base"])) / component).glob("*.safetensors"))
        before, after = read_tensors(base)[0], read_tensors(trained)[0]
        assert all(before[name].ne(after[name]).any() for name in before)


def test_accumulated_batches_make_the_step_of_one_large_batch(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    small = {
        "training.train_batch_size": 1,
        "training.gradient_accumulation_steps": 3,
        "output_dir": str(tmp_path / "a"),
    }
    large = {
        "training.train_batch_size": 3,
        "training.gradient_accumulation_steps": 1,
        "output_dir": str(tmp_path / "b"),
    }
    for fields in (small, large):
        assert run_in_child(tiny_fields | fields) == 0
    for one, other in zip(metric_rows(tmp_path / "a"), metric_rows(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_resume_continues_with_a_new_learning_rate(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | {"checkpointing.every": 2, "training.max_train_steps": 2}
    assert run_in_child(fields) == 0
    longer = fields | {"training.max_train_steps": 4, "training.learning_rate": 5e-4}
    assert run_in_child(longer) == 0
    assert [row["lr"] for row in metric_rows(tmp_path / "run")] == [1e-3, 1e-3, 5e-4, 5e-4]


def test_finished_model_without_checkpoints_is_not_overwritten(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    assert run_in_child(tiny_fields) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = final_bytes(tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a finished model"):
        train([f"{field}={json.dumps(value)}" for field, value in tiny_fields.items()], resume=True)
    assert final_bytes(tmp_path / "run") == before


def test_damaged_checkpoint_is_named_and_the_one_before_serves(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | {"checkpointing.every": 2}
    assert run_in_child(fields) == 0
    run = RunFolder(tmp_path / "run")
    assert run.complete_steps() == [2, 4]
    weights = run.checkpoint_dir(4) / "unet.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = [f"{field}={json.dumps(value)}" for field, value in fields.items()]
    with pytest.raises(CheckpointError, match="step-000004"):
        train(arguments, resume=True)


def test_streams_of_randomness_differ() -> None:
    seeds = {randomness.derive_seed(0, stream, step) for stream in ("a", "b") for step in range(100)}
    assert len(seeds) == 200
