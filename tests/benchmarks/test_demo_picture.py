from pathlib import Path

import pytest
from PIL import Image

from benchmarks.demo import photographs
from benchmarks.demo.picture import OF_CLASS, OF_SUBJECT, compose, given
from lowmem_db.config.loading import load_config

ROOT = Path(__file__).parents[2]


def test_picture_has_three_rows_and_fits_a_page() -> None:
    photos = given(load_config(ROOT / "configs" / "demo.yaml"))
    rows = [
        ("given", photos),
        ("subject", [(prompt, Image.new("RGB", (128, 128), "red")) for prompt in OF_SUBJECT]),
        ("class", [(prompt, Image.new("RGB", (128, 128), "blue")) for prompt in OF_CLASS]),
    ]
    sheet = compose(rows)
    assert len(photos) == 5
    assert sheet.width <= 900
    colours = [colour for _, colour in sheet.getcolors(1 << 20) or []]
    assert {(255, 0, 0), (0, 0, 255)} <= set(colours)


def test_class_prompts_are_those_of_the_subject_without_its_identifier() -> None:
    contexts = [prompt.removeprefix("a dog").removeprefix("a cat") for prompt in OF_CLASS]
    assert all("sks" in prompt for prompt in OF_SUBJECT)
    assert not any("sks" in prompt for prompt in OF_CLASS)
    assert {context for context in contexts if context.startswith(" ")} <= {
        prompt.removeprefix("a sks dog") for prompt in OF_SUBJECT
    }


def test_photographs_are_trained_on_as_the_demo_is(tmp_path: Path) -> None:
    demo = load_config(ROOT / "configs" / "demo.yaml")
    assert len(photographs.SUBJECTS) == 4
    for subject in photographs.SUBJECTS:
        config = photographs.config_of(subject, tmp_path)
        assert (config.training, config.ema, config.objective) == (demo.training, demo.ema, demo.objective)
        assert config.sampling.guidance_scale == demo.sampling.guidance_scale
        assert config.subject.instance_prompt == f"a sks {subject.noun}"
        assert len(given(config)) == 5


def test_a_photographed_subject_has_a_row_of_photos_places_and_its_class(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def drawn(_source: object, columns: list[list[str]], *_: object, **__: object) -> list[list[Image.Image]]:
        asked.extend(columns)
        return [[Image.new("RGB", (128, 128), "red") for _ in columns]]

    monkeypatch.setattr(photographs, "train", lambda *_, **__: None)
    monkeypatch.setattr(photographs, "find_source", lambda _: None)
    monkeypatch.setattr(photographs, "draw", drawn)
    [car] = [subject for subject in photographs.SUBJECTS if subject.noun == "car"]
    heading, cells = photographs.row_of(car, tmp_path)
    assert asked[0] == ["a sks car on the beach"]
    assert asked[-1] == ["a car"]
    assert [label for label, _ in cells][1:4] == ["one of five photos", "on the beach", "in the snow"]
    assert compose([(heading, cells)]).width <= 900
