"""How a run of two processes ends: killed, asked to stop, out of memory; and how it goes on with another number."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowmem_db.config.loading import load_config
from lowmem_db.run.run import train
from lowmem_db.storage.run_folder import RunFolder, read_rows
from lowmem_db.training import trainer as trainer_module
from tests.distributed.ranks import Fields, kill_myself, rank, run_ranks
from tests.distributed.test_law import assert_same_run, assert_same_tensors, one_process

_FIELDS = {"training.max_train_steps": 5, "checkpointing.every": 2, "training.learning_rate": 1e-3}
_IN_BACKWARD = {"memory.optimizer_in_backward": True, "training.clipping": "none", "optimizer.name": "adamw8bit"}


@pytest.fixture
def fields(tiny_fields: Fields, tmp_path: Path) -> Fields:
    return {**tiny_fields, **_FIELDS, "output_dir": str(tmp_path / "run"), "prior.num_class_images": 3}


def test_killed_rank_ends_the_run_and_one_process_goes_on(
    fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(2, _train, fields, 1, 3, kill_myself) == [2, -signal.SIGKILL]
    run = RunFolder(tmp_path / "run")
    said = capfd.readouterr().err
    assert "rank 0: ended, because rank 1 did: it died without a word: it was killed" in said
    assert f"the last good checkpoint is {run.checkpoint_dir(3)}, continue with --resume" in said
    assert run.complete_steps() == [2, 3]  # the weights were whole, so the third step was not lost
    _train({**fields, "training.gradient_accumulation_steps": 2}, resume=True)
    assert_same_final(tmp_path / "run", one_process(fields, tmp_path / "one", accumulation=2))


@pytest.mark.long
def test_run_of_one_process_goes_on_with_two_and_with_one_again(
    fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = {**fields, "training.gradient_accumulation_steps": 2, "memory.optimizer_in_backward": False}
    _train({**alone, "training.max_train_steps": 2})
    fields = {**fields, "memory.optimizer_in_backward": False}
    assert run_ranks(2, _resume, {**fields, "training.max_train_steps": 3}) == [0, 0]
    said = capfd.readouterr().err
    assert "resume: distributed.num_processes was 1, is now 2" in said
    assert "photos instead of" not in said
    _train(alone, resume=True)
    assert_same_final(tmp_path / "run", one_process(fields, tmp_path / "one", accumulation=2))


@pytest.mark.long
def test_step_of_another_size_is_told(fields: Fields, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, _train, {**fields, "training.max_train_steps": 2}) == [0, 0]
    _train({**fields, "training.max_train_steps": 3}, resume=True)
    said = capfd.readouterr().err
    assert "a step has 1 photos instead of 2; to go on as before, set training.gradient_accumulation_steps=2" in said


@pytest.mark.long
def test_killed_rank_in_the_backward_pass_leaves_the_last_checkpoint(fields: Fields, tmp_path: Path) -> None:
    fields = {**fields, **_IN_BACKWARD}
    assert run_ranks(2, _train_until_nth_gradient, fields, 3, 20) == [2, -signal.SIGKILL]
    assert RunFolder(tmp_path / "run").complete_steps() == [2]
    assert run_ranks(2, _resume, fields) == [0, 0]
    assert_same_final(tmp_path / "run", one_process(fields, tmp_path / "one", accumulation=2))


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.long), 1])
def test_signal_to_one_rank_stops_all_after_the_same_step(
    asked: int, fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(2, _train, fields, asked, 2, _terminate_me) == [130, 130]
    said = capfd.readouterr().err
    of_rank = {0: r"SIGTERM", 1: r"SIGTERM of rank 1"}[asked]
    assert re.search(rf"rank 0: {of_rank}: stopped after step 3; continue with --resume", said)
    run = RunFolder(tmp_path / "run")
    assert run.complete_steps() == [2, 3]
    assert [row["step"] for row in read_rows(run.metrics_file)] == [1, 2, 3]


@pytest.mark.long
def test_stopped_run_goes_on_with_two(fields: Fields, tmp_path: Path) -> None:
    assert run_ranks(2, _train, fields, 1, 2, _terminate_me) == [130, 130]
    assert run_ranks(2, _resume, fields) == [0, 0]
    assert_same_run(tmp_path / "run", one_process(fields, tmp_path / "one", accumulation=2))


@pytest.mark.long
@pytest.mark.parametrize("full", [0, 1])
def test_full_card_ends_all_after_one_save(
    full: int, fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(2, _train, fields, full, 3, _run_out_of_memory) == [3, 3]
    said = capfd.readouterr().err
    assert "step 4: out of memory on the device" in said
    assert f"rank {1 - full}: ended, because rank {full} did: step 4: out of memory" in said
    assert RunFolder(tmp_path / "run").complete_steps() == [2, 3]


@pytest.mark.long
def test_loss_that_is_not_finite_is_named_by_all(
    fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(2, _train_with_nan, fields) == [2, 2]
    said = capfd.readouterr().err
    assert len(re.findall(r"rank \d: step 2: the loss of photo\d.png.* is not finite", said)) == 2
    assert RunFolder(tmp_path / "run").complete_steps() == []


@pytest.mark.long
def test_other_photos_on_another_machine_are_refused(fields: Fields, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, _train_with_another_prompt, fields) == [2, 2]
    assert "rank 1 has other photos, class images and captions than rank 0" in capfd.readouterr().err


@pytest.mark.parametrize("reduce", ["ordered", "sum"])
@pytest.mark.long
def test_fewer_class_images_than_processes(reduce: str, fields: Fields, tmp_path: Path) -> None:
    fields = {**fields, "prior.num_class_images": 1, "training.max_train_steps": 2, "distributed.reduce": reduce}
    assert run_ranks(3, _train, fields) == [0, 0, 0]
    assert [row["samples"] for row in read_rows(tmp_path / "run" / "ranks.jsonl")] == [[2, 2, 2]] * 2


def assert_same_final(one: Path, other: Path) -> None:
    assert_same_tensors(one / "final", other / "final")
    last = [RunFolder(folder).checkpoint_dir(RunFolder(folder).complete_steps()[-1]) for folder in (one, other)]
    assert_same_tensors(last[0], last[1])


def _train(
    fields: Fields,
    of_rank: int = 0,
    in_step: int | None = None,
    happens: Callable[[], None] = lambda: None,
    *,
    resume: bool = False,
) -> None:
    """Train; something happens in one rank after so many steps."""
    step_now = trainer_module.train_step

    def step(*arguments: object) -> object:
        if arguments[-1] == in_step and rank() == of_rank:
            happens()
        return step_now(*arguments)  # type: ignore[arg-type]

    trainer_module.train_step = step  # type: ignore[assignment]
    try:
        train(load_config(None, list(fields.items())), resume=resume)
    finally:
        trainer_module.train_step = step_now


def _resume(fields: Fields) -> None:
    _train(fields, resume=True)


def _terminate_me() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def _train_until_nth_gradient(fields: Fields, in_step: int, number: int) -> None:
    from lowmem_db.optimizers.in_backward import InBackwardHandle

    on_gradient, seen = InBackwardHandle._on_gradient, [0]

    def counting(handle: InBackwardHandle, unit: object) -> None:
        seen[0] += handle.num_steps == in_step
        if seen[0] == number and rank() == 1:
            kill_myself()
        on_gradient(handle, unit)  # type: ignore[arg-type]

    InBackwardHandle._on_gradient = counting  # type: ignore[method-assign]
    _train(fields)


def _train_with_nan(fields: Fields) -> None:
    from lowmem_db.objective.objective import Objective

    loss = Objective.loss

    def spoiled(objective: Objective, prediction: torch.Tensor, noised: object) -> object:
        calls.append(1)
        is_bad = rank() == 1 and len(calls) == 2
        return loss(objective, prediction * torch.nan if is_bad else prediction, noised)  # type: ignore[arg-type]

    calls: list[int] = []
    Objective.loss = spoiled  # type: ignore[method-assign]
    _train(fields)


def _train_with_another_prompt(fields: Fields) -> None:
    if rank() == 1:
        trainer_module.Trainer._data_key = lambda self: "other"  # type: ignore[method-assign]
    _train(fields)
