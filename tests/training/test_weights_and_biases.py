"""Runs at Weights & Biases, with a module in its place that writes down what it is told."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lowmem_db import environment
from lowmem_db.config.loading import load_config
from lowmem_db.errors import DependencyError
from lowmem_db.run.checks import uses_wandb
from lowmem_db.run.run import train


class Error(Exception):
    """As ``wandb.errors.Error``."""


class Run:
    """As ``wandb.Run``."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        assert not self.is_finished
        self.logged.append(values)

    def finish(self) -> None:
        self.is_finished = True


class Module(ModuleType):
    """As ``wandb``."""

    errors = SimpleNamespace(Error=Error)

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[Run] = []
        self.is_logged_in, self.refuses = True, False

    def login(self, prompt: bool = True) -> bool:
        assert prompt is False
        return self.is_logged_in

    def init(self, **options: Any) -> Run:
        if self.refuses:
            raise Error("project not\nfound")
        self.runs.append(Run(options))
        return self.runs[-1]

    def Image(self, path: str, caption: str) -> tuple[str, str]:
        return Path(path).name, caption


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Module:
    module = Module()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


@pytest.fixture
def fields(tiny_fields: dict[str, object]) -> dict[str, object]:
    return tiny_fields | {
        "prior.enabled": False, "training.max_train_steps": 2, "logging.wandb": True, "checkpointing.every": 1,
        "sampling.prompts": ["a zx dog"], "sampling.num_images": 2, "sampling.num_inference_steps": 1,
        "sampling.every": 2,
    }  # fmt: skip


def test_rows_and_samples_are_sent(wandb: Module, fields: dict[str, object], tmp_path: Path) -> None:
    train(load_config(None, list(fields.items())))
    (run,) = wandb.runs
    assert run.is_finished
    assert run.axes == [("*", "step")]
    assert run.options["project"] == "lowmem-db"
    assert run.options["name"] == "run"
    assert run.options["config"]["training"]["max_train_steps"] == 2
    first, second, samples = run.logged
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [first, second] == [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert "loss_prior" not in first
    assert samples["step"] == 2
    assert len(samples["samples"]) == 2
    assert not [name for name, _ in samples["samples"] if name == "grid.png"]


def test_a_resumed_run_goes_on_and_a_new_one_does_not(wandb: Module, fields: dict[str, object], tmp_path: Path) -> None:
    train(load_config(None, list(fields.items())))
    train(load_config(None, list((fields | {"training.max_train_steps": 3}).items())), resume=True)
    train(load_config(None, list((fields | {"output_dir": str(tmp_path / "other")}).items())))
    first, resumed, other = wandb.runs
    assert first.options["id"] == resumed.options["id"] != other.options["id"]
    assert resumed.options["resume"] == "allow"
    assert [row["step"] for row in resumed.logged] == [3, 3]


@pytest.mark.parametrize("failure", ["is_logged_in", "refuses"])
def test_a_refusal_says_what_to_do(wandb: Module, fields: dict[str, object], failure: str, tmp_path: Path) -> None:
    setattr(wandb, failure, failure == "refuses")
    with pytest.raises(DependencyError, match=r"^logging\.wandb: .*`wandb login`, set WANDB_MODE=offline") as refused:
        train(load_config(None, list(fields.items())))
    assert "\n" not in str(refused.value)
    assert (tmp_path / "run" / "config.yaml").exists() is (failure == "refuses"), "who is not logged in is told first"


def test_offline_needs_no_login(wandb: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.is_logged_in = False
    monkeypatch.setenv("WANDB_MODE", "offline")
    environment.check_wandb()


def test_missing_library_is_named_with_its_extra(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DependencyError, match=r'pip install "lowmem-db\[wandb\]"'):
        train(load_config(None, list(fields.items())))


@pytest.mark.parametrize(
    ("wanted", "is_there", "used"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_all_means_what_is_installed(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch, wanted: bool | None, is_there: bool, used: bool
) -> None:
    monkeypatch.setattr(environment, "is_installed", lambda name: is_there)
    assert uses_wandb(load_config(None, list((fields | {"logging.wandb": wanted}).items()))) is used
