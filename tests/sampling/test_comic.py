"""Comics: scripts that can be used and that cannot, and words that are drawn into every picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowmem_db.errors import DataError
from lowmem_db.sampling.comic import Script, compose, draw_panels, read_script


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def grey(width: int = 128, height: int = 128) -> Image.Image:
    return Image.new("RGB", (width, height), (120, 130, 140))


def drawn(panel: dict[str, object], image: Image.Image) -> Image.Image:
    (found,) = draw_panels(Script.model_validate({"panels": [{"prompt": "a dog", **panel}]}), [[image]])
    return found


def test_script_is_read(tmp_path: Path) -> None:
    found = read_script(
        script(
            tmp_path,
            """
title: Breakfast
columns: 3
panels:
  - prompt: a {identifier} {class_noun} with a fork
    words: Time to eat! “Now”, at 5
    caption: One morning …
    image: 2
  - prompt: a dog
""",
        )
    )
    assert (found.title, found.columns, len(found.panels)) == ("Breakfast", 3, 2)
    assert (found.panels[0].image, found.panels[1].words) == (2, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("panels: []", "panels: is empty; allowed: panels: [{prompt: "),
        ("title: x", "panels: is missing"),
        ("panels: a dog", "panels: 'a dog' is no list of panels; allowed: panels: [{prompt: "),
        ("panels: [{prompt: ' '}]", "panels[0].prompt: is empty; write what is drawn"),
        ("- a dog", "is not a script of panels"),
        ("panels: [a dog]", "panels[0]: 'a dog' is no panel; allowed: {prompt: 'a dog', words: 'Time to eat!'}"),
        ("panels: [{words: hello}]", "panels[0].prompt: is missing"),
        (
            "panels: [{prompt: a dog, word: hello}]",
            "panels[0].word: is no field; allowed: prompt, words",
        ),
        ("panels: [{prompt: a dog, words: yes}]", "panels[0].words: True is no text; write it in quotes"),
        ("panels: [{prompt: a dog, image: -1}]", "panels[0].image: '-1'"),
        ("panels: [{prompt: a dog}]\ncolumns: 9", "columns: '9'"),
        ("panels: [{prompt: a dog}]\nfont: no.ttf", "cannot be read as a font"),
        ("panels: [{prompt: a dog, words: привет}]", "has no '\\u043f'"),
        ("panels: [{prompt: a dog, words: café}]", "Pillow's own font has no '\\xe9'; name one that has"),
        ("panels: [{prompt: a dog", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_with_a_script_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        read_script(script(tmp_path, text))
    assert message in str(error.value)
    assert "script.yaml" in str(error.value)


def test_script_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.yaml: does not exist"):
        read_script(tmp_path / "nothing.yaml")


def test_words_are_black_on_white_inside_the_picture() -> None:
    silent, speaking = drawn({}, grey()), drawn({"words": "Time to eat!"}, grey())
    assert silent.size == speaking.size == (384, 384)
    differing = np.argwhere(np.asarray(silent) != np.asarray(speaking))
    top, bottom = differing[:, 0].min(), differing[:, 0].max()
    assert 0 < top < bottom < 384 // 2
    changed = np.asarray(speaking)[top:bottom]
    assert (changed == 255).all(-1).sum() > 1000
    assert (changed == 0).all(-1).sum() > 100


@pytest.mark.parametrize("words", ["w" * 300, "long words " * 27, "one\ntwo\nthree\nfour\nfive"])
@pytest.mark.parametrize("size", [(64, 64), (512, 96), (96, 512), (1, 1)])
def test_words_of_any_length_keep_to_the_panel_and_never_hide_the_picture(words: str, size: tuple[int, int]) -> None:
    panel = drawn({"words": words}, grey(*size))
    assert panel.width >= 384
    pixels = np.asarray(panel)
    is_picture = (pixels == (120, 130, 140)).all(-1)
    assert is_picture.sum() >= 0.4 * panel.width * (panel.width * size[1] / size[0]) - 6 * sum(panel.size)
    assert not (pixels[:, -1] == (0, 0, 0)).all(-1)[: panel.height - int(panel.width * size[1] / size[0])].any()


def test_panels_stand_in_rows_below_the_title_and_captions_make_room() -> None:
    story = {
        "title": "A day",
        "columns": 2,
        "panels": [{"prompt": "a"}, {"prompt": "b", "caption": "Later …"}, {"prompt": "c"}],
    }
    found = Script.model_validate(story)
    panels = draw_panels(found, [[grey()], [grey()], [grey()]])
    assert panels[1].height > panels[0].height == 384
    whole = compose(found, panels)
    assert whole.width == 2 * 384 + 3 * 12
    untitled = compose(found.model_copy(update={"title": ""}), panels)
    assert whole.height > untitled.height == panels[1].height + panels[2].height + 3 * 12
