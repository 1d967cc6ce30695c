"""What captions say, and whether the classifier sees it in drawings."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.demo_base import captions as composed
from benchmarks.demo_base import nouns, render, scenes
from lowmem_db.evaluation.captions import (
    COLOURS,
    FOLDER,
    LABELS,
    NOUNS,
    PLAIN,
    SCENES,
    WEIGHTS_FILE,
    Caption,
    caption_pairs,
    read_accuracy,
    read_caption,
)
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.folders import Limits, find_subjects
from lowmem_db.evaluation.metrics import summarise
from lowmem_db.evaluation.report import evaluate, metric_rows, remarks
from lowmem_db.evaluation.scoring import Pictures, score_pictures
from tests.evaluation.conftest import CPU, PHOTOGRAPHS, random_picture, write_images

DRAWINGS = Path(__file__).parents[1] / "assets" / "drawings"
FIGURES = ("caption_noun", "caption_colour", "caption_background")


@pytest.fixture(scope="module")
def classifier() -> Encoder:
    return load_encoder(find_encoders(["captions"])[0], CPU)


def compose(noun: str, seed: int, colour: str | None = None, background: str = "white") -> Image.Image:
    cutout = Image.open(DRAWINGS / f"{noun}.png").convert("RGBA")
    shown = composed.Attributes(noun, colour=colour, background=background)
    return render.compose(cutout, shown, random.Random(seed))


def test_words_are_those_of_the_demo_base() -> None:
    assert tuple(nouns.NOUNS) == NOUNS
    assert tuple(render.HUES) == COLOURS
    assert tuple(scenes.PLAIN) == PLAIN
    assert set(scenes.SCENES) == set(SCENES)


def test_composed_captions_are_read_truly() -> None:
    """Nothing is read that is not shown, and nothing that the caption names is missed."""
    rng = random.Random(0)
    for _ in range(4000):
        shown = render.draw_attributes(rng.choice(NOUNS), rng.random() < 0.3, rng)
        text = composed.compose_caption(shown, rng, filler=["sks", "olis", "xyz"])
        read = read_caption(text)
        assert read is not None, text
        assert read.noun == shown.noun, text
        assert read.colour in (None, shown.colour), text
        assert read.background in (None, shown.background), text
        said = composed.background_phrase(shown.background, rng)
        assert (read.background is not None) == any(
            text.endswith(phrase) for phrase in SCENES.get(shown.background, (said,))
        ), text
        assert (read.colour is not None) == bool(shown.colour and f" {shown.colour} {shown.noun}" in f" {text}"), text


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a sks dog", Caption(noun="dog")),
        ("a photo of a sks cat face.", Caption(noun="cat face")),
        ("A sks red dog  in the snow", Caption(noun="dog", colour="red", background="snow")),
        ("a red sks dog", Caption(noun="dog", colour="red")),
        ("red glasses on the left on a gray background", Caption(noun="glasses", colour="red", background="gray")),
        ("an orange on the beach", None),
        ("a dog wearing a hat", None),
        ("a cat dog", None),
        ("a red green dog", None),
        ("a dog with a city in the background", None),
        ("a hat of a dog", None),
        ("a very fluffy dog", None),
        ("a dog that is not on the beach", None),
        ("not a dog", None),
        ("a monster toy", None),
        ("a dog and a red car", None),
        ("a dog on the left and a cat on the right", None),
        ("a cat face wearing glasses", None),
        ("a pencil sketch of a red fox at sunset", Caption(noun="fox", colour="red", background="sunset")),
        ("pixel art of a teapot on a wooden table", Caption(noun="teapot", background="table")),
        ("a black and white picture of a bee", Caption(noun="bee")),
        ("", None),
    ],
)
def test_what_a_prompt_says(prompt: str, caption: Caption | None) -> None:
    assert read_caption(prompt) == caption


def test_pairs_are_of_what_the_captions_say() -> None:
    dog = Caption(noun="dog", colour="red", background="snow")
    pairs = caption_pairs([dog, Caption(noun="cat")], [[dog, replace(dog, colour="blue")], [dog]])
    assert [values.tolist() for values in pairs["noun"]] == [[1, 1], [0]]
    assert [values.tolist() for values in pairs["colour"]] == [[1, 0]]
    assert [values.tolist() for values in pairs["background"]] == [[1, 1]]
    assert caption_pairs([], []) == {"noun": [], "colour": [], "background": []}
    assert caption_pairs([dog], [[]]) == {"noun": [], "colour": [], "background": []}


def test_drawings_of_an_unseen_style_are_named(classifier: Encoder) -> None:
    """Composed drawings score high under their own captions, low when the captions change places."""
    wanted = [
        ("shoe", "red", "snow"),
        ("robot", "blue", "beach"),
        ("backpack", "green", "night"),
        ("house", "purple", "white"),
    ]
    prompts = [
        f"a {colour} {noun} {composed.background_phrase(place, random.Random(0))}" for noun, colour, place in wanted
    ]
    images = [[compose(noun, seed, colour, place) for seed in range(4)] for noun, colour, place in wanted]

    def figures(texts: list[str]) -> dict[str, float | None]:
        pictures = Pictures(photos=[], prompts=list(zip(texts, images, strict=True)))
        scored = score_pictures(classifier, pictures)
        assert set(scored.metrics) == set(FIGURES)
        return {name: summarise({"": pairs}).value for name, pairs in scored.metrics.items()}

    true, shuffled = figures(prompts), figures([*prompts[1:], prompts[0]])
    for name in FIGURES:
        assert (true[name] or 0) >= 0.75, (name, true)
        assert (shuffled[name] or 0) <= 0.2, (name, shuffled)


def test_unreadable_prompts_give_no_figure(classifier: Encoder) -> None:
    image = random_picture(0)
    prompts = [("a monster toy", [image]), (None, [image]), ("a dog", [])]
    scored = score_pictures(classifier, Pictures(photos=[], prompts=prompts))
    assert scored.metrics == {name: [] for name in FIGURES}
    assert classifier.name_images([]) == []


def test_report_has_the_accuracy_of_the_classifier_beside_its_figures(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["a sks dog", "a dog in the snow"], 2)
    subjects = find_subjects(images, PHOTOGRAPHS / "dog3", None, Limits())
    report = evaluate(subjects, find_encoders(["captions"]), CPU)
    assert {name: found["num_pairs"] for name, found in report["metrics"].items()} == {
        "caption_noun": 4, "caption_colour": 0, "caption_background": 2,
    }  # fmt: skip
    for name, attribute in zip(FIGURES, LABELS, strict=True):
        assert report["metrics"][name]["classifier_accuracy"] == read_accuracy()[attribute]
    assert report["metrics"]["caption_noun"]["interval"] is not None
    assert [row[0] for row in metric_rows(report)] == ["metric", *FIGURES]
    said = "\n".join(remarks(report))
    of_labels = read_accuracy()["labels"]
    dogs = of_labels["noun"]["dog"]
    assert report["metrics"]["caption_noun"]["classifier_accuracy_on_named"] == dogs
    assert report["metrics"]["caption_background"]["classifier_accuracy_on_named"] == of_labels["background"]["snow"]
    assert report["metrics"]["caption_colour"]["classifier_accuracy_on_named"] is None
    own = f"{read_accuracy()['noun']:.3f}, and {dogs:.3f} on what these prompts name"
    assert f"caption_noun: on drawings in an unseen style the classifier itself reaches {own}" in said
    assert "caption_colour: no prompt that the classifier can read names a colour" in said


def test_weights_are_small() -> None:
    assert (FOLDER / WEIGHTS_FILE).stat().st_size < 2 * 2**20
