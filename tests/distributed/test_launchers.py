"""Runs as users start them: under torchrun and accelerate launch, on the CPU and on two cards."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lowmem_db.storage.run_folder import read_rows
from tests.distributed.ranks import Fields, arguments_of, free_port, skip_without_fsdp2
from tests.distributed.test_law import SAME_NORM, assert_same_run

_ROOT = Path(__file__).parents[2]
_TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port")
_ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port")
_ON_CARDS: dict[str, Fields] = {
    "after the backward pass": {"memory.optimizer_in_backward": False},
    "in the backward pass, 24-bit weights": {
        "memory.optimizer_in_backward": True,
        "memory.weights": "bf16_extra_bits",
        "optimizer.name": "adamw8bit",
        "training.clipping": "none",
    },
    "LoRA": {"lora.enabled": True, "lora.rank": 2},
    "shared out": {"distributed.sharding": "full", "memory.optimizer_in_backward": False},
    "shared out, in the backward pass, 24-bit weights": {
        "distributed.sharding": "full",
        "memory.optimizer_in_backward": True,
        "memory.weights": "bf16_extra_bits",
        "optimizer.name": "adamw8bit",
        "training.clipping": "none",
    },
}


@pytest.mark.long
@pytest.mark.parametrize("launcher", [_TORCHRUN, _ACCELERATE], ids=["torchrun", "accelerate"])
def test_launcher_starts_two_processes_of_one_run(launcher: Sequence[str], tiny_fields: Fields, tmp_path: Path) -> None:
    fields = {**tiny_fields, "training.max_train_steps": 2}
    said = start([*launcher, str(free_port()), "-m", "lowmem_db"], fields, tmp_path / "two" / "run")
    assert said.count("done: ") == 1
    assert [row["samples"] for row in read_rows(tmp_path / "two" / "run" / "ranks.jsonl")] == [[2, 2]] * 2
    start(["lowmem_db"], {**fields, "training.gradient_accumulation_steps": 2}, tmp_path / "one" / "run")
    assert_same_run(tmp_path / "two" / "run", tmp_path / "one" / "run", norm=SAME_NORM)


@pytest.mark.long
def test_launcher_starts_two_processes_that_share_a_model_out(
    tiny_fields: Fields, wide_model: Path, tmp_path: Path
) -> None:
    skip_without_fsdp2()
    fields = {**tiny_fields, "model.base": str(wide_model), "training.max_train_steps": 2}
    said = start(
        [*_TORCHRUN, str(free_port()), "-m", "lowmem_db"], fields | {"distributed.sharding": "full"}, tmp_path / "two"
    )
    assert said.count("done: ") == 1
    start(["lowmem_db"], {**fields, "training.gradient_accumulation_steps": 2}, tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("variant", _ON_CARDS)
def test_two_cards_are_one_that_accumulates_two_batches(
    variant: str, tiny_fields: Fields, wide_model: Path, tmp_path: Path
) -> None:
    fields = {**tiny_fields, **_ON_CARDS[variant], "device": "cuda", "training.max_train_steps": 4}
    if "distributed.sharding" in fields:
        skip_without_fsdp2()
        fields["model.base"] = str(wide_model)
    start([*_TORCHRUN, str(free_port()), "-m", "lowmem_db"], fields, tmp_path / "two" / "run")
    alone = {"training.gradient_accumulation_steps": 2, "memory.optimizer_in_backward": False}
    alone |= {"distributed.sharding": "none"}
    start(["lowmem_db"], {**fields, **alone}, tmp_path / "one" / "run")
    assert_same_run(tmp_path / "two" / "run", tmp_path / "one" / "run", norm=SAME_NORM)


def start(program: Sequence[str], fields: Fields, folder: Path) -> str:
    """Train in a process of its own, and those that it starts; return what they said."""
    paths = {"PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *program, "train", *arguments_of({**fields, "output_dir": str(folder)})],
        env=os.environ | paths,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
