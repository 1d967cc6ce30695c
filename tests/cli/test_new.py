"""``lowmem-db new``: a configuration for photos, by question or by option."""

import sys
from pathlib import Path

import pytest

import lowmem_db
from lowmem_db.config.loading import load_config
from lowmem_db.errors import ConfigError
from lowmem_db.run import new as making
from tests.cli.conftest import Run


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A planner that answers at once; what it was asked for."""
    asked: list[object] = []

    def plan(config, *, gpu=None):
        asked.append((config.model.base, gpu))

    monkeypatch.setattr("lowmem_db.api.plan", plan)
    monkeypatch.setattr(making, "answer_of", lambda found: ["Plan for a card: 1.0 GiB", "time: none", "disk: none"])
    return asked


def test_a_file_for_the_demo_model_with_a_real_plan(run: Run, photos_dir: Path, tiny_model: Path) -> None:
    outcome = run("new", photos_dir, "--what", "Red kettle", "--config", "demo", "--base", tiny_model, "--yes")
    assert (outcome.code, outcome.out) == (0, "red-kettle.yaml\n"), outcome.err
    text = Path("red-kettle.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25
    for said in ("3 photos", "Plan for CPU", "time, predicted", "disk, at most"):
        assert said in text
    assert "lowmem-db train red-kettle.yaml" in outcome.err
    config = load_config(Path("red-kettle.yaml"))
    assert (config.output_dir, config.subject.instance_dir) == (Path("runs/red-kettle"), photos_dir)


def test_what_is_not_given_is_asked(run: Run, photos_dir: Path, planned: list, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([str(photos_dir), "dog", "sd15_lora"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda *args, **options: next(answers))
    assert run("new", "--gpu", "rtx 3060").out == "dog.yaml\n"
    assert load_config(Path("dog.yaml")).lora.enabled
    assert planned == [("stable-diffusion-v1-5/stable-diffusion-v1-5", "rtx 3060")]


def test_the_next_free_name_is_taken_and_nothing_is_overwritten(photos_dir, planned, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/dog2").mkdir(parents=True)
    files = [lowmem_db.new(photos_dir, "dog", config="demo") for _ in range(2)]
    assert files == [Path("dog.yaml"), Path("dog3.yaml")]
    with pytest.raises(ConfigError, match="exists and will not be overwritten"):
        lowmem_db.new(photos_dir, "dog", config="demo", output="dog.yaml")


def test_a_base_brings_the_configuration_of_its_family(photos_dir, planned, tiny_model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(lowmem_db.new(photos_dir, "dog", base="demo")).data.resolution == 128
    with pytest.raises(ConfigError, match="--config"):
        lowmem_db.new(photos_dir, "dog", config="sd16")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--what", "dog", "--yes"], "PHOTOS: nowhere does not exist"),
        (["{photos}", "--yes"], "--what: is missing"),
        (["{photos}"], "--what: is missing and nobody can be asked here"),
        (["{photos}", "--what", "dog", "--config", "sdxl_lroa", "--yes"], "did you mean sdxl_lora"),
        (["{photos}", "--what", "dog", "--base", "./nowhere", "--yes"], "nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_slow(run: Run, photos_dir: Path, arguments: list[str], said: str) -> None:
    outcome = run("new", *(each.format(photos=photos_dir) for each in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert not list(Path().glob("*.yaml"))
