import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.render import HUES, SIZE, compose, tint
from benchmarks.demo_base.scenes import PLAIN


@pytest.fixture
def cutout() -> Image.Image:
    drawing = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    ImageDraw.Draw(drawing).rectangle((0, 0, SIZE, SIZE), fill=(170, 120, 90, 255))
    ImageDraw.Draw(drawing).rectangle((0, 0, SIZE // 8, SIZE), fill=(0, 0, 0, 255))
    return drawing


def drawn(cutout: Image.Image, shown: Attributes) -> np.ndarray:
    return np.asarray(compose(cutout, shown, random.Random(0))).astype(int)


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_tinted_drawing_has_the_named_colour(cutout: Image.Image, colour: str) -> None:
    middle = np.asarray(tint(cutout, colour))[SIZE // 2, SIZE // 2, :3]
    assert middle.argmax() == ["red", "green", "blue"].index(colour)
    assert set(HUES) < set(PLAIN)


def test_background_has_the_named_colour(cutout: Image.Image) -> None:
    picture = drawn(cutout, Attributes("dog", background="yellow"))
    assert np.abs(picture[0, 0] - PLAIN["yellow"]).max() <= 8


def test_left_is_left_of_right(cutout: Image.Image) -> None:
    left, right = (drawn(cutout, Attributes("dog", position=side, size="small")) for side in ("left", "right"))
    columns = [np.nonzero((picture < 250).any((0, 2)))[0].mean() for picture in (left, right)]
    assert columns[0] < SIZE / 2 < columns[1]


@pytest.mark.parametrize(("noun", "mirrored"), [("dog", False), ("ball", True)])
def test_only_what_looks_alike_from_both_sides_is_mirrored(cutout: Image.Image, noun: str, mirrored: bool) -> None:
    dark_right = set()
    for seed in range(12):
        picture = (
            np.asarray(compose(cutout, Attributes(noun, size="large"), random.Random(seed))).astype(int).sum((0, 2))
        )
        dark_right.add(bool(picture[SIZE // 2 :].sum() < picture[: SIZE // 2].sum()))
    assert (True in dark_right) == mirrored
