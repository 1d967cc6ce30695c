import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.demo_base.accessories import put_on
from benchmarks.demo_base.captions import STYLE_PHRASES, Attributes
from benchmarks.demo_base.finish import STYLES
from benchmarks.demo_base.nouns import FACES, NOUNS, ONE_SIDED, WEARERS
from benchmarks.demo_base.render import HUES, SIZE, add_extras, compose, draw_attributes, tint
from benchmarks.demo_base.scenes import CLUTTER, PLAIN, SCENES, paint_background


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


def test_two_subjects_stand_side_by_side(cutout: Image.Image) -> None:
    shown = Attributes("ball", colour="red", second="ball", second_colour="blue")
    picture = np.asarray(compose(cutout, shown, random.Random(0), cutout)).astype(int)
    reddish = np.nonzero((picture[..., 0] - picture[..., 2] > 90).any(0))[0]
    bluish = np.nonzero((picture[..., 2] - picture[..., 0] > 90).any(0))[0]
    assert reddish.max() < bluish.min() + SIZE // 8
    assert reddish.mean() < SIZE / 2 < bluish.mean()


def round_head() -> Image.Image:
    drawing = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    ImageDraw.Draw(drawing).ellipse((30, 20, 98, 124), fill=(200, 160, 120, 255))
    return drawing


def test_hat_is_on_top_of_the_head_and_glasses_are_inside_it() -> None:
    head = round_head()
    hat = np.asarray(put_on(head, "hat", "red", 1.0, random.Random(0))).astype(int)
    red = np.argwhere((hat[..., 0] > 190) & (hat[..., 1] < 80) & (hat[..., 3] > 200))
    assert red[:, 0].mean() < 45
    assert abs(red[:, 1].mean() - SIZE / 2) < 4
    with_glasses = np.asarray(put_on(head, "glasses", "blue", 1.0, random.Random(0)))
    changed = np.argwhere((with_glasses != np.asarray(head)).any(-1))
    assert 40 < changed[:, 0].mean() < 80
    assert (with_glasses[..., 3] > 128).sum() == pytest.approx((np.asarray(head)[..., 3] > 128).sum(), abs=50)


@pytest.mark.parametrize("style", STYLES)
def test_styles_change_the_picture_and_keep_its_size(style: str) -> None:
    plain = compose(round_head(), Attributes("ball", colour="red", background="blue"), random.Random(0))
    styled = STYLES[style](plain, random.Random(0))
    assert (styled.size, styled.mode) == (plain.size, plain.mode)
    assert np.abs(np.asarray(styled).astype(int) - np.asarray(plain)).mean() > 1
    assert set(STYLES) == set(STYLE_PHRASES)


def test_extras_go_together() -> None:
    rng = random.Random(0)
    shown = [add_extras(draw_attributes(rng.choice(list(NOUNS)), False, rng), list(NOUNS), rng) for _ in range(4000)]
    assert {one.style for one in shown} == {None, *STYLES}
    assert {one.wearing for one in shown} == {None, "hat", "glasses"}
    assert all(one.noun in WEARERS for one in shown if one.wearing)
    assert all(one.noun in FACES for one in shown if one.wearing == "glasses")
    assert not any(one.colour for one in shown if one.style in ("sketch", "black and white"))
    assert all(one.style == "photo" for one in shown if one.background == CLUTTER)
    assert not any(one.position for one in shown if one.second)
    assert set(ONE_SIDED) | set(WEARERS) <= set(NOUNS)


def test_backgrounds_differ() -> None:
    pictures = {
        name: np.asarray(paint_background(name, SIZE, random.Random(0))).astype(int) for name in (*SCENES, CLUTTER)
    }
    for name, picture in pictures.items():
        assert picture.shape == (SIZE, SIZE, 3)
        assert all(np.abs(picture - other).mean() > 8 for others, other in pictures.items() if others != name), name
