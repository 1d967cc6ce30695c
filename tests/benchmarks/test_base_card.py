"""The captions of the base card are those that the classifier reads, and two cards are compared on what both have."""

import random

import pytest
from PIL import Image, ImageDraw

from benchmarks.demo_base.captions import POSITIONS
from benchmarks.demo_base.nouns import NOUNS
from benchmarks.demo_base.render import HUES
from benchmarks.demo_base.scenes import PLAIN, SCENES
from benchmarks.quality.base_card import captioned, difference, is_at, seeds_of, summary
from lowmem_db.evaluation.captions import Caption, read_caption


def test_every_caption_is_read_as_it_is_drawn() -> None:
    found = captioned(list(NOUNS), [*PLAIN, *SCENES], random.Random(0))
    read = [read_caption(text) for text, _ in found]
    for caption, (text, shown) in zip(read, found, strict=True):
        assert isinstance(caption, Caption), text
        assert (caption.noun, caption.colour) == (shown.noun, shown.colour)
        assert caption.background in (None, shown.background)
        assert (f"the {shown.position}" in text) == (shown.position is not None)
    assert {caption.noun for caption in read if caption} == set(NOUNS)
    assert {caption.colour for caption in read if caption} == {None, *HUES}
    assert {caption.background for caption in read if caption} == {None, *PLAIN, *SCENES}
    assert {shown.position for _, shown in found} == {None, *POSITIONS}


def test_seeds_depend_on_the_caption_and_its_repetition_alone() -> None:
    seeds = seeds_of(["a dog", "a dog", "a cat"])
    assert seeds[0] != seeds[1]
    assert seeds_of(["a cat", "a dog"]) == [seeds[2], seeds[0]]


@pytest.mark.parametrize(("box", "side"), [((4, 32, 60, 96), "left"), ((68, 32, 124, 96), "right"),
                                           ((32, 4, 96, 60), "top"), ((32, 68, 96, 124), "bottom")])  # fmt: skip
def test_position_is_where_the_foreground_is(box: tuple[int, int, int, int], side: str) -> None:
    picture = Image.new("RGB", (128, 128), (58, 92, 205))
    ImageDraw.Draw(picture).rectangle(box, fill=(205, 50, 50))
    assert [name for name in POSITIONS if is_at(picture, name)] == [side]


def test_a_picture_without_foreground_is_nowhere() -> None:
    assert not any(is_at(Image.new("RGB", (128, 128), "white"), name) for name in POSITIONS)


def test_cards_are_compared_on_the_captions_of_both() -> None:
    earlier = {"noun": {"a dog": [0.0, 0.0], "a cat": [1.0, 1.0], "a bus": [1.0, 1.0]}}
    later = {"noun": {"a dog": [1.0, 1.0], "a cat": [1.0, 0.0], "a fox": [0.0, 0.0]}, "position": {}}
    assert summary(later)["noun"]["value"] == pytest.approx(0.5)
    found = difference(later, earlier)
    assert found["noun"]["value"] == pytest.approx(0.25)
    assert found["noun"]["num_images"] == 2
    assert found["position"]["value"] is None
