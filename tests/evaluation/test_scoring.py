"""Metrics of pictures, on photographs and with encoders of every kind."""

from pathlib import Path

import pytest
from PIL import Image

from lowmem_db.data.photos import read_photo
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.metrics import summarise
from lowmem_db.evaluation.scoring import METRICS, Pictures, score_pictures
from tests.evaluation.conftest import CPU, PHOTOGRAPHS, SUBJECTS, random_picture


def photographs(subject: str) -> list[Image.Image]:
    return [read_photo(file) for file in sorted((PHOTOGRAPHS / subject).glob("*.jpg"))]


def value(encoder: Encoder, metric: str, pictures: Pictures) -> float | None:
    return summarise({"subject": score_pictures(encoder, pictures).metrics[metric]}).value


@pytest.mark.parametrize("subject", SUBJECTS)
def test_fidelity_is_highest_to_the_right_subject(en0: Encoder, subject: str) -> None:
    """Each photo in turn takes the place of a drawn image, and is compared with the other photos of every subject."""
    drawn = photographs(subject)

    def fidelity(other: str) -> float:
        values = []
        for index, image in enumerate(drawn):
            photos = photographs(other)
            if other == subject:
                del photos[index]
            values.append(value(en0, "EN0-I", Pictures(photos=photos, prompts=[("", [image])])))
        return sum(values) / len(values)

    found = {other: fidelity(other) for other in SUBJECTS}
    assert found[subject] > max(other for name, other in found.items() if name != subject) + 0.04, found


def test_identical_images_are_perfect_and_not_diverse(en0: Encoder) -> None:
    photo = photographs("dog3")[0]
    pictures = Pictures(photos=[photo], prompts=[("a dog", [photo, photo])], class_images=[photo])
    assert value(en0, "EN0-I", pictures) == pytest.approx(1)
    assert value(en0, "EN0-PRES", pictures) == pytest.approx(1)
    assert value(en0, "EN0-DIV", pictures) == pytest.approx(0, abs=1e-9)


def test_different_images_are_more_diverse_than_similar_ones(en0: Encoder) -> None:
    dogs, robot = photographs("dog3"), photographs("robot_toy")[0]
    similar = value(en0, "EN0-DIV", Pictures(photos=dogs, prompts=[("", dogs[:2])]))
    different = value(en0, "EN0-DIV", Pictures(photos=dogs, prompts=[("", [dogs[0], robot])]))
    assert different > similar > 0


def test_one_image_has_no_diversity(en0: Encoder) -> None:
    scored = score_pictures(en0, Pictures(photos=photographs("dog3")[:1], prompts=[("a dog", [random_picture(0)])]))
    assert summarise({"": scored.metrics["EN0-DIV"]}).num_pairs == 0
    assert summarise({"": scored.metrics["EN0-PRES"]}).num_pairs == 0
    assert summarise({"": scored.real["EN0-I"]}).num_pairs == 0
    assert summarise({"": scored.metrics["EN0-I"]}).num_pairs == 1


def test_every_encoder_gives_its_metrics(dino_folder: Path, clip_folder: Path, lpips_file: Path) -> None:
    pictures = Pictures(
        photos=[random_picture(seed) for seed in range(3)],
        prompts=[
            (prompt, [random_picture(10 * index + seed) for seed in range(2)]) for index, prompt in enumerate("ab")
        ],
        class_images=[random_picture(seed) for seed in range(50, 55)],
    )
    num_pairs = {"DINO": 12, "PRES": 15, "CLIP-I": 12, "CLIP-T": 4, "DIV": 2}
    found = {}
    for files in find_encoders([f"dino={dino_folder}", f"clip={clip_folder}", f"lpips={lpips_file}"]):
        scored = score_pictures(load_encoder(files, CPU), pictures)
        assert set(scored.metrics) == set(METRICS[files.kind].values())
        found |= {name: summarise({"": pairs}).num_pairs for name, pairs in scored.metrics.items()}
    assert found == num_pairs


def test_prompt_fidelity_counts_known_prompts_alone(clip_folder: Path) -> None:
    encoder = load_encoder(find_encoders([f"clip={clip_folder}"])[0], CPU)
    images = [random_picture(0), random_picture(1)]
    known = Pictures(photos=images, prompts=[("a dog", images)])
    mixed = Pictures(photos=images, prompts=[(None, images[:1]), ("a dog", images)])
    assert value(encoder, "CLIP-T", mixed) == pytest.approx(value(encoder, "CLIP-T", known))
    unknown = score_pictures(encoder, Pictures(photos=images, prompts=[(None, images[:1])]))
    assert unknown.metrics["CLIP-T"] == []


def test_prompt_fidelity_knows_its_prompt(clip_folder: Path) -> None:
    """Shuffled prompts change each prompt's value, and the mean of both texts stays."""
    encoder = load_encoder(find_encoders([f"clip={clip_folder}"])[0], CPU)
    image = [random_picture(0)]
    dog, cat = (
        value(encoder, "CLIP-T", Pictures(photos=image, prompts=[(text, image)])) for text in ("a dog", "a cat")
    )
    both = value(encoder, "CLIP-T", Pictures(photos=image, prompts=[("a dog", image), ("a cat", image)]))
    assert dog != pytest.approx(cat, abs=1e-4)
    assert both == pytest.approx((dog + cat) / 2)
