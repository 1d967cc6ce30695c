"""Who watches a run is told everything in order, and is heard."""

import errno
import gc
import io
import json
import re
import shutil
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.console import console
from lowmem_db.run import attempts as run_module
from lowmem_db.run.run import train
from lowmem_db.storage.atomic import as_storage_error
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.observers import ConsoleBar, Observer, Training
from lowmem_db.training.trainer import Trainer


class Diary(Observer):
    """Writes down what it is told, and asks for what its fields say."""

    def __init__(self, *, checkpoint_at: int | None = None, stop_after: int | None = None) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.last = 0
        self._checkpoint_at, self._stop_after = checkpoint_at, stop_after

    def start(self, trainer: Training) -> None:
        self.entries.append(("start", trainer.step))

    def step(self, row: Mapping[str, Any]) -> None:
        self.entries.append(("step", row["step"]))
        self.last = row["step"]

    def checkpoint(self, step: int) -> None:
        self.entries.append(("checkpoint", step))

    def samples(self, step: int, folder: Path) -> None:
        self.entries.append(("samples", step, folder.name))

    def end(self) -> None:
        self.entries.append(("end",))

    def wants_checkpoint(self, step: int) -> bool:
        return step == self._checkpoint_at

    def reason_to_stop(self) -> str | None:
        return "the diary is full" if self.last == self._stop_after else None


@pytest.fixture
def fields(tiny_fields: dict[str, object]) -> dict[str, object]:
    return tiny_fields | {"prior.enabled": False, "training.max_train_steps": 3, "checkpointing.every": 2}


def test_an_observer_is_told_everything_in_order(fields: dict[str, object]) -> None:
    fields |= {"sampling.prompts": ["a zx dog"], "sampling.num_images": 1, "sampling.num_inference_steps": 1}
    diary = Diary()
    train(load_config(None, list(fields.items())), observers=[diary])
    assert diary.entries == [
        ("start", 0), ("step", 1), ("step", 2), ("samples", 2, "step-000002"), ("checkpoint", 2), ("step", 3),
        ("samples", 3, "step-000003"), ("checkpoint", 3), ("end",),
    ]  # fmt: skip


def test_an_observer_can_ask_for_a_checkpoint_and_for_an_end(
    fields: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(load_config(None, list(fields.items())), observers=[Diary(checkpoint_at=1, stop_after=2)])
    assert run.complete_steps() == [1, 2]
    assert len(run.metrics_file.read_text().splitlines()) == 2
    assert "the diary is full: stopped after step 2" in capsys.readouterr().err
    diary = Diary()
    train(load_config(None, list(fields.items())), resume=True, observers=[diary])
    assert diary.entries[:2] == [("start", 2), ("step", 3)]


def test_every_observer_that_was_started_is_ended_when_one_fails(fields: dict[str, object], tmp_path: Path) -> None:
    class Failing(Observer):
        def step(self, row: Mapping[str, Any]) -> None:
            raise OSError("no more paper")

    diary = Diary()
    with pytest.raises(OSError, match="no more paper"):
        train(load_config(None, list(fields.items())), observers=[diary, Failing()])
    assert diary.entries == [("start", 0), ("step", 1), ("end",)]
    rows = RunFolder(tmp_path / "run").metrics_file.read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1]


def test_the_last_model_is_freed_before_the_best_one_is_loaded(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[weakref.ref[Trainer]] = []
    alive: list[int] = []
    build = run_module.build_trainer

    def recording(*arguments: Any) -> Trainer:
        alive.append(sum(trainer() is not None for trainer in built))
        made = build(*arguments)
        built.append(weakref.ref(made))
        return made

    monkeypatch.setattr(run_module, "build_trainer", recording)
    monkeypatch.setattr(Trainer, "step_to_keep", lambda trainer: 2)
    gc.disable()  # the collector would free it some time later
    try:
        train(load_config(None, list(fields.items())))
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_a_run_that_is_gone_goes_on_from_its_copy(fields: dict[str, object], tmp_path: Path) -> None:
    fields |= {"checkpointing.copy_to": tmp_path / "drive", "sampling.prompts": ["a zx dog"], "sampling.num_images": 1}
    fields |= {"sampling.num_inference_steps": 1}
    run = train(load_config(None, list(fields.items())))
    copy = RunFolder(tmp_path / "drive")
    assert copy.complete_steps() == [3]
    assert [folder.name for folder in copy.checkpoints_dir.iterdir()] == ["step-000003"]
    assert (copy.samples_dir(2) / "grid.png").is_file()
    final = (run.final_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(run.root)
    diary = Diary()
    again = train(load_config(None, list(fields.items())), resume=True, observers=[diary])
    assert diary.entries == [("start", 3), ("end",)]
    assert (again.final_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == final
    assert len(again.metrics_file.read_text().splitlines()) == 3


def test_a_full_second_disk_ends_no_run(
    fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, write: object) -> None:
        raise as_storage_error(OSError(errno.ENOSPC, "No space left"), path)

    monkeypatch.setattr("lowmem_db.storage.run_copy.write_folder", full)
    run = train(load_config(None, list((fields | {"checkpointing.copy_to": tmp_path / "drive"}).items())))
    assert run.final_dir.is_dir()
    warned = "warning: checkpointing.copy_to: .*: the disk is full; .*; the run goes on without a new copy"
    assert re.search(warned, capsys.readouterr().err)


REQUIRED = [("subject.instance_prompt", "a sks dog"), ("subject.class_prompt", "a dog"), ("model.base", "demo")]
ROW = {"step": 120, "loss": 0.1234, "loss_instance": 0.1, "loss_prior": 0.02, "seconds": 0.5, "peak_bytes": 6 << 30}


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "cp932"])
def test_bar_shows_step_percent_and_time_left_in_80_columns(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_width", 80)
    monkeypatch.setattr(console, "is_interactive", True)
    config = load_config(None, [("output_dir", "r"), ("subject.instance_dir", "p"), *REQUIRED])
    nothing = {"run": None, "denoiser": None} | dict.fromkeys(("weights", "save_checkpoint", "tell"), lambda *_: None)
    bar, training = ConsoleBar(), SimpleNamespace(config=config, step=100, **nothing)
    bar.start(training)
    for step in range(101, 121):
        bar.step(ROW | {"step": step})
    bar._bar.refresh()
    bar.end()
    screen.flush()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.buffer.getvalue().decode(encoding))
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert max(map(len, lines)) <= 80
    assert re.search(r"training .* 120/800 +15% +[-0-9:]+ left", shown)
    assert "loss 0.1234 (photos 0.100, class 0.020), 0.50 s/step, 6.00 GiB" in lines


def test_without_a_terminal_a_line_says_the_same(fields: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    train(load_config(None, list(fields.items())))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    assert re.fullmatch(r"step 3/3 \(100 %\), 0:00:00 left, loss \d\.\d{4}, \d\.\d\d s/step, \d\.\d\d GiB", lines[-1])
