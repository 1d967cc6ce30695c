import random

import pytest

from benchmarks.demo_base.captions import Attributes, article, compose_caption
from benchmarks.demo_base.nouns import HELD_OUT, NOUNS, STYLES, noun_of
from benchmarks.demo_base.scenes import PLAIN


def captions_of(shown: Attributes, count: int = 300) -> set[str]:
    rng = random.Random(0)
    return {compose_caption(shown, rng) for _ in range(count)}


@pytest.mark.parametrize(
    ("phrase", "expected"), [("dog", "a dog"), ("orange dog", "an orange dog"), ("red glasses", "red glasses")]
)
def test_article(phrase: str, expected: str) -> None:
    assert article(phrase) == expected


def test_bare_caption_is_common_on_white() -> None:
    rng = random.Random(0)
    bare = sum(compose_caption(Attributes("dog"), rng) == "a dog" for _ in range(500))
    assert bare > 200


def test_a_caption_names_no_colour_that_is_not_shown() -> None:
    for caption in captions_of(Attributes("dog", background="blue")):
        assert set(caption.split()) & set(PLAIN) <= {"blue"}
        assert "red" not in caption


def test_colour_belongs_to_the_noun_and_not_to_the_background() -> None:
    captions = captions_of(Attributes("dog", colour="red", background="blue"))
    assert "a red dog on a blue background" in captions
    assert not any("blue dog" in caption or "red background" in caption for caption in captions)


def test_position_size_and_scene() -> None:
    captions = captions_of(Attributes("clock", background="beach", position="left", size="small"))
    assert "a small clock on the left on the beach" in captions
    assert not any("right" in caption or "large" in caption for caption in captions)


def test_only_flat_drawings_are_called_flat() -> None:
    assert not any("flat" in caption for caption in captions_of(Attributes("cat")))
    assert any("flat" in caption for caption in captions_of(Attributes("cat", flat=True)))


def test_filler_words_are_inserted_now_and_then() -> None:
    rng = random.Random(0)
    captions = [compose_caption(Attributes("dog"), rng, ["sks"]) for _ in range(1000)]
    assert 20 < sum("sks dog" in caption for caption in captions) < 120


def test_held_out_designs_have_no_training_noun() -> None:
    assert all(noun_of(key) is None for key in HELD_OUT)
    assert noun_of("noto/dog") == "dog"
    assert noun_of("fxemoji/dog") == "dog face"


def test_every_noun_has_a_drawing_left() -> None:
    for noun, slugs in NOUNS.items():
        assert any(noun_of(f"{style}/{slug}") == noun for style in STYLES for slug in slugs), noun
