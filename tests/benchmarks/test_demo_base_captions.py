import random

import pytest

from benchmarks.demo_base.captions import STYLE_PHRASES, Attributes, article, compose_caption
from benchmarks.demo_base.nouns import CLASSIFIER_STYLE, HELD_OUT, NOUNS, STYLES, noun_of, noun_of_slug
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


def test_two_subjects_are_named_from_left_to_right() -> None:
    captions = captions_of(Attributes("dog", second="car", second_colour="red", background="snow"))
    assert "a dog and a red car in the snow" in captions
    assert "a dog on the left and a red car on the right on the snow" in captions
    assert all("dog" in caption.split("car")[0] for caption in captions)


def test_what_is_worn_is_named_with_its_colour() -> None:
    captions = captions_of(Attributes("cat", colour="blue", wearing="hat", wearing_colour="red"))
    assert {"a blue cat wearing a red hat", "a blue cat wearing a hat"} <= captions
    assert captions_of(Attributes("cat", wearing="glasses", wearing_colour="red")) > {"a cat wearing red glasses"}


@pytest.mark.parametrize("style", STYLE_PHRASES)
def test_a_style_is_named_by_nearly_every_caption(style: str) -> None:
    rng = random.Random(0)
    shown = Attributes("dog", style=style, background="clutter")
    captions = [compose_caption(shown, rng) for _ in range(300)]
    assert sum(caption.startswith(STYLE_PHRASES[style]) for caption in captions) > 260
    assert not any("clutter" in caption for caption in captions)


def test_held_out_designs_have_no_training_noun() -> None:
    assert all(noun_of(key) is None for key in HELD_OUT)
    assert noun_of("noto/dog") == "dog"
    assert noun_of("fxemoji/dog") == "dog face"


def test_the_base_learns_no_drawing_of_the_classifiers_own_style() -> None:
    assert noun_of(f"{CLASSIFIER_STYLE}/bird_2") is None
    assert noun_of_slug("bird_2") == "bird"


def test_every_noun_has_a_drawing_left() -> None:
    for noun, slugs in NOUNS.items():
        assert any(noun_of(f"{style}/{slug}") == noun for style in STYLES for slug in slugs), noun
