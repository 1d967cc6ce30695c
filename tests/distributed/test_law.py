"""W processes that accumulate A batches are the same run as one process that accumulates W times A."""

from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.run.run import train
from lowmem_db.storage.run_folder import RunFolder, read_rows
from tests.distributed.ranks import Fields, run_ranks

STEPS = 3
_COMMON = {"training.max_train_steps": STEPS, "training.train_text_encoder": True, "checkpointing.every": 2}
_IN_BACKWARD = {"memory.optimizer_in_backward": True, "training.clipping": "update_rms"}
_24_BITS = {"optimizer.name": "adamw8bit", "memory.weights": "bf16_extra_bits"}
VARIANTS = {
    "adamw, bf16 autocast, moving rate": {
        "training.mixed_precision": "bf16",
        "training.lr_scheduler": "cosine",
        "objective.conditioning_dropout": 0.3,
    },
    "8-bit in the backward pass, 24-bit weights": _IN_BACKWARD | _24_BITS,
    "LoRA, average, min-SNR": {
        "lora.enabled": True,
        "lora.rank": 2,
        "ema.enabled": True,
        "objective.snr_gamma": 5.0,
    },
    "buckets, text encoder stopped": {
        "data.aspect_ratio_buckets": True,
        "training.stop_text_encoder_training": 1,
        "training.train_batch_size": 2,
    },
    "adamw in the backward pass": {"memory.optimizer_in_backward": True, "training.clipping": "none"},
    "fp16 autocast, 8 bits": {"training.mixed_precision": "fp16", "optimizer.name": "adamw8bit"},
    "fp16 autocast, 8 bits in the backward pass": {
        "training.mixed_precision": "fp16",
        "optimizer.name": "adamw8bit",
        "memory.optimizer_in_backward": True,
        "training.clipping": "per_tensor",
    },
    "textual inversion": {
        "subject.instance_prompt": "a <z>",
        "subject.class_prompt": "a d",
        "textual_inversion.enabled": True,
        "textual_inversion.token": "<z>",
        "training.learning_rate": 5e-6,
        "prior.enabled": False,
        "training.train_text_encoder": False,
    },
    "streamed weights and states": _IN_BACKWARD
    | _24_BITS
    | {
        "memory.stream_optimizer_state": True,
        "memory.stream_weights": True,
        "memory.checkpointing": "nested",
    },
}
QUICK = {"8-bit in the backward pass, 24-bit weights"}
SAME_NORM = 1e-6  # relative: in the backward pass it is summed in another order
SAME_NORM_OF_TENSORS = 5e-6  # where the norm of each tensor comes from another kernel too


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in VARIANTS]
)
def test_two_processes_are_one_that_accumulates_two_batches(variant: str, tiny_fields: Fields, tmp_path: Path) -> None:
    fields = {**tiny_fields, **_COMMON, **VARIANTS[variant]}
    assert run_ranks(2, _train, fields | {"output_dir": str(tmp_path / "two" / "run")}) == [0, 0]
    one = one_process(fields, tmp_path / "one" / "run", accumulation=2)
    is_of_tensors = "memory.optimizer_in_backward" in fields and "memory.weights" not in fields
    assert_same_run(tmp_path / "two" / "run", one, norm=SAME_NORM_OF_TENSORS if is_of_tensors else SAME_NORM)


@pytest.mark.long
@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (3, 2)])
def test_in_order_any_number_of_processes_is_one(
    size: int, accumulation: int, tiny_fields: Fields, tmp_path: Path
) -> None:
    fields = {
        **tiny_fields,
        **_COMMON,
        "distributed.reduce": "ordered",
        "training.gradient_accumulation_steps": accumulation,
    }
    assert run_ranks(size, _train, fields | {"output_dir": str(tmp_path / "many")}) == [0] * size
    assert_same_run(tmp_path / "many", one_process(fields, tmp_path / "one", accumulation=size * accumulation))


@pytest.mark.long
def test_two_processes_that_accumulate_keep_the_order_of_one(tiny_fields: Fields, tmp_path: Path) -> None:
    fields = {**tiny_fields, **_COMMON, "training.gradient_accumulation_steps": 2}
    assert run_ranks(2, _train, fields | {"output_dir": str(tmp_path / "two")}) == [0, 0]
    assert_same_run(tmp_path / "two", one_process(fields, tmp_path / "one", accumulation=4))


def one_process(fields: Fields, folder: Path, *, accumulation: int) -> Path:
    """Train in one process, which cannot accumulate in the backward pass: after it, with the same clipping."""
    changed = {
        "output_dir": str(folder),
        "training.gradient_accumulation_steps": accumulation,
        "memory.optimizer_in_backward": False,
        "memory.stream_weights": False,
    }
    _train({**fields, **changed})
    return folder


def assert_same_run(many: Path, one: Path, *, norm: float = SAME_NORM) -> None:
    for step in RunFolder(one).complete_steps():
        assert_same_tensors(RunFolder(many).checkpoint_dir(step), RunFolder(one).checkpoint_dir(step))
    assert_same_tensors(many / "final", one / "final")
    rows = read_rows(many / "metrics.jsonl"), read_rows(one / "metrics.jsonl")
    assert [_compared(row) for row in rows[0]] == [_compared(row) for row in rows[1]]
    norms = [[row["grad_norm"] for row in found] for found in rows]
    assert norms[0] == pytest.approx(norms[1], rel=norm)
    assert not (one / "ranks.jsonl").exists()
    for row in read_rows(many / "ranks.jsonl"):
        assert len(set(row["samples"])) == 1
    assert len(read_rows(many / "ranks.jsonl")) == len(rows[0])


def assert_same_tensors(one: Path, other: Path) -> None:
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert files
    assert files == sorted(file.relative_to(other) for file in other.rglob("*.safetensors"))
    assert [file for file in files if (one / file).read_bytes() != (other / file).read_bytes()] == []


def _compared(row: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in {"seconds", "peak_bytes", "grad_norm"}}


def _train(fields: Fields) -> None:
    train(load_config(None, list(fields.items())))
