from pathlib import Path

from PIL import Image

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
