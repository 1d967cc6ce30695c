"""The package from Python: from a folder of photos to a model, pictures, scores and a file."""

import subprocess
import sys
from pathlib import Path

import pytest

import lowmem_db
from lowmem_db.errors import BudgetError, ConfigError


def test_importing_is_light_and_offers_what_all_says() -> None:
    code = (
        "import sys, lowmem_db; lowmem_db.Config, lowmem_db.train, lowmem_db.export;"
        "print(*sorted({'torch', 'diffusers', 'transformers', 'typer'} & sys.modules.keys()));"
        "print(*lowmem_db.__all__)"
    )
    heavy, offered = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert heavy == ""
    assert offered.split() == [
        "Config",
        "ask",
        "evaluate",
        "export",
        "gallery",
        "generate",
        "load_config",
        "new",
        "plan",
        "publish",
        "report",
        "train",
    ]
    assert set(offered.split()) <= set(dir(lowmem_db))


def test_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"module 'lowmem_db' has no attribute 'fine_tune'"):
        _ = lowmem_db.fine_tune


def test_from_photos_to_a_model(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    config = lowmem_db.load_config(overrides=tiny_fields | {"training.max_train_steps": 2, "prior.num_class_images": 2})
    assert lowmem_db.plan(config).peak_bytes > 0
    run = lowmem_db.train(config)
    ((prompt, images),) = lowmem_db.generate(run.root, ["a zx dog"], num_images=2, num_inference_steps=1)
    assert (prompt, [image.size for image in images]) == ("a zx dog", [(32, 32)] * 2)
    report = lowmem_db.evaluate(
        run.root, num_prompts=1, num_images=2, num_class_images=1, num_inference_steps=1, output=tmp_path / "scores"
    )
    assert report["metrics"]["EN0-I"]["num_pairs"] == 2 * 3
    assert lowmem_db.export(run.root, tmp_path / "dog", layout="diffusers").joinpath("model_index.json").is_file()
    assert callable(lowmem_db.export), "the room of the same name must not take its place"


def test_errors_are_those_of_the_command_line(tiny_fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"training\.learning_rat: unknown field; did you mean training\.le"):
        lowmem_db.load_config(overrides=tiny_fields | {"training.learning_rat": 1})
    config = lowmem_db.load_config(overrides=tiny_fields)
    with pytest.raises(BudgetError, match=r"memory\.budget: 0\.0 GiB is less than any strategy needs"):
        lowmem_db.plan(config, budget="1MiB")
    with pytest.raises(ConfigError, match=r"--budget: 'much' is not a size"):
        lowmem_db.plan(config, budget="much")
