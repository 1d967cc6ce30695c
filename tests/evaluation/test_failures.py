"""The failures of figure 9, each planted and found."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowmem_db.data.photos import read_photo
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.failures import failure_lines, failures_of, find_nearest, sees_context
from lowmem_db.evaluation.scoring import Pictures, score_pictures
from tests.evaluation.conftest import CPU, PHOTOGRAPHS, random_picture


def photographs(subject: str) -> list[Image.Image]:
    return [read_photo(file) for file in sorted((PHOTOGRAPHS / subject).glob("*.jpg"))]


def test_reason_is_the_papers() -> None:
    rows = {
        "a dog on the moon": {"CLIP-T_context": 0.25, "CLIP-T_context_untuned": 0.25},
        "a dog in the snow": {"CLIP-T_context": 0.0, "CLIP-T_context_untuned": 0.75},
        "a dog on the beach": {"CLIP-T_context": 0.5, "CLIP-T_context_untuned": 1.0},
    }
    found = failures_of(rows, None)["context"]
    assert (found["num_prompts"], found["figure"]) == (3, "CLIP-T_context")
    assert [(each["prompt"], each["reason"]) for each in found["not_drawn"]] == [
        ("a dog in the snow", "low co-occurrence"),
        ("a dog on the moon", "weak prior"),
    ]
    (line, *_) = failure_lines("dog", failures_of(rows, None))
    assert line.startswith(
        "dog: 2 of 3 contexts are not drawn (CLIP-T_context below 0.5): a dog in the snow (0.00, before"
    )


def test_reason_is_left_open_where_nobody_drew_before_training() -> None:
    found = failures_of({"a dog on a red background": {"caption_background": 0.0}}, None)
    assert found["context"]["not_drawn"] == [{"prompt": "a dog on a red background", "share": 0.0}]
    assert found["entanglement"] is found["copies"] is None
    assert failures_of({"a dog": {"EN0-I": 0.5}}, None) == dict.fromkeys(("context", "entanglement", "copies"))
    assert failure_lines("dog", failures_of({}, None)) == []


def test_context_is_seen_where_the_whole_prompt_fits_better_than_the_class() -> None:
    prompt, alone = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    images = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    assert sees_context(images, prompt, alone).tolist() == [True, False, False]


def test_copies_are_found_and_alike_photos_are_told() -> None:
    photos = torch.eye(3)
    images = [torch.tensor([[1.0, 0.1, 0.0], [1.0, 1.0, 1.0]]), torch.zeros(0, 3)]
    nearest = find_nearest(images, photos)
    assert nearest.images.tolist() == pytest.approx([1 / 1.01**0.5, 3**-0.5])
    assert nearest.photos.tolist() == [0, 0, 0]
    found = failures_of({"a": {"copies": 0.5}, "b": {"copies": 0.0}}, nearest)["copies"]
    assert (found["share"], found["prompts"]) == (0.5, {"a": 0.5})
    assert find_nearest(images, photos[:1]).photos.tolist() == []
    assert failures_of({}, find_nearest([torch.zeros(0, 3)], photos))["copies"] is None


def test_planted_failures_are_found_by_the_encoder_that_needs_no_network(en0: Encoder) -> None:
    photos, robot = photographs("dog3"), photographs("robot_toy")
    pictures = Pictures(
        photos=photos, plain=photos[1:], prompts=[("copied", [photos[0], robot[0]]), ("entangled", robot[1:])]
    )
    scored = score_pictures(en0, pictures)
    found = failures_of(scored.of_prompts, scored.nearest)
    assert found["copies"]["share"] == 0.25
    assert found["copies"]["prompts"] == {"copied": 0.5}
    assert found["copies"]["nearest_photo_of_photos"] < 0.92
    assert list(found["entanglement"]["most"]) == ["entangled", "copied"]
    assert found["entanglement"]["drop"] > 0.2
    without = score_pictures(en0, replace(pictures, plain=()))
    assert failures_of(without.of_prompts, without.nearest)["entanglement"] is None


def test_clip_compares_prompts_with_the_class_before_and_after(clip_folder: Path) -> None:
    encoder = load_encoder(find_encoders([f"clip={clip_folder}"])[0], CPU)
    images = [random_picture(seed) for seed in range(3)]
    pictures = Pictures(
        photos=images, class_caption="a dog", untuned=[("a dog in the snow", images[:1])],
        prompts=[("a dog in the snow", images), ("a dog", images), (None, images)],
    )  # fmt: skip
    rows = score_pictures(encoder, pictures).of_prompts
    assert {name for name in rows["a dog in the snow"] if "context" in name} == {
        "CLIP-T_context", "CLIP-T_context_untuned"
    }  # fmt: skip
    assert not any("context" in name for name in rows["a dog"])
    swapped = replace(
        pictures, class_caption="a dog in the snow", prompts=[("a dog", images)], untuned=[("a dog", images[:1])]
    )
    other = score_pictures(encoder, swapped).of_prompts["a dog"]
    assert other["CLIP-T_context"] == pytest.approx(1 - rows["a dog in the snow"]["CLIP-T_context"])
    assert "CLIP-T_context" not in score_pictures(encoder, replace(pictures, class_caption=None)).of_prompts["a dog"]


def test_entanglement_is_only_claimed_where_fidelity_is_lower() -> None:
    for drop, told in (
        (0.1, "is lower than without a context by 0.100, most in: a dog (0.10)"),
        (-0.1, "is not lower"),
    ):
        (line,) = failure_lines("dog", failures_of({"a dog": {"EN0-I": 0.5, "EN0-I_drop": drop}}, None))
        assert told in line
        assert "-0.100" not in line
