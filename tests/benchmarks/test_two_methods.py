"""The commands of both methods: configurations that are accepted, and what is compared is what was drawn."""

from pathlib import Path

import pytest

from benchmarks.two_methods import commands
from lowmem_db.config import shipped
from lowmem_db.config.flags import parse_arguments
from lowmem_db.config.loading import load_config


@pytest.mark.parametrize("config", ["demo", "sd15", "sd15_lora", "sdxl"])
def test_both_methods_train_on_the_same_photos(config: str, tmp_path: Path) -> None:
    dreambooth, word, *_ = commands(
        tmp_path / "my photos", "teapot", tmp_path, config=config, fields=["seed=3"], word_steps=70, evaluated=[]
    )
    configs = []
    for name, *arguments in (dreambooth, word):
        assert name == "train"
        parsed = parse_arguments(arguments)
        assert parsed.resume
        configs.append(load_config(shipped.find(Path(config)), parsed.overrides))
    first, second = configs
    assert first.subject.instance_dir == second.subject.instance_dir == tmp_path / "my photos"
    assert (first.seed, second.seed) == (3, 3)
    assert first.prior.enabled
    assert first.subject.instance_prompt == "a sks teapot"
    assert (second.subject.instance_prompt, second.initializer) == ("a <subject>", "teapot")
    assert second.textual_inversion.enabled
    assert not second.prior.enabled
    assert second.training.max_train_steps == 70
    assert first.output_dir.parent == second.output_dir.parent != first.output_dir


def test_what_is_shown_and_asked_about_is_what_was_drawn(tmp_path: Path) -> None:
    first, second, evaluate, gallery, pairs = commands(
        Path("photos"), "teapot", tmp_path, config="sd15", fields=[], word_steps=5000, evaluated=["--encoder", "paper"]
    )
    runs = [tmp_path / "runs" / name for name in ("dreambooth", "textual_inversion")]
    assert [f"output_dir={run}" in train for run, train in zip(runs, (first, second), strict=True)] == [True, True]
    images = [str(tmp_path / "images" / run.name) for run in runs]
    assert evaluate == ["evaluate", str(runs[0].parent), "--output", str(tmp_path / "images"), "--encoder", "paper"]
    assert gallery[1:3] == pairs[2:4] == images
