"""Who watches a run is told everything in order, and is heard."""

import gc
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.run import attempts as run_module
from lowmem_db.run.run import train
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.observers import Observer, Training
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
