"""Sharpness, and photos that are nearly the same."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from lowmem_db.data.likeness import BLURRED, difference_hash, near_duplicates, sharpness

PHOTOS = sorted((Path(__file__).parents[2] / "examples" / "dog3").glob("*.jpg"))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in PHOTOS]


def test_photos_are_sharp_until_they_are_blurred(photos: list[Image.Image]) -> None:
    for photo in photos[:3]:
        values = [sharpness(photo.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 4)]
        assert values == sorted(values, reverse=True)
        assert values[1] > BLURRED > values[2]


def test_a_blurred_background_does_not_matter(photos: list[Image.Image]) -> None:
    portrait = photos[0].filter(ImageFilter.GaussianBlur(8))
    portrait.paste(photos[0].crop((128, 128, 384, 384)), (128, 128))
    assert sharpness(portrait) > BLURRED


def test_one_photo_in_several_versions_is_found(photos: list[Image.Image]) -> None:
    first = photos[0]
    noise = np.random.default_rng(0).integers(-6, 7, (*first.size[::-1], 3))
    versions = {
        "original": first,
        "small": first.resize((200, 200)),
        "bright": ImageEnhance.Brightness(first).enhance(1.2),
        "noisy": Image.fromarray(np.clip(np.asarray(first) + noise, 0, 255).astype(np.uint8)),
    }
    others = {f"photo{number}": photo for number, photo in enumerate(photos[1:])}
    hashes = {Path(name): difference_hash(image) for name, image in (versions | others).items()}
    assert near_duplicates(hashes) == [tuple(map(Path, versions))]
    assert not near_duplicates({Path("a"): difference_hash(first), Path("b"): difference_hash(ImageOps.mirror(first))})
