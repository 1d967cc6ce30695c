"""Near-duplicate photos, on photographs."""

import io

import pytest
from PIL import Image, ImageOps

from lowmem_db.data.photos import read_photo
from lowmem_db.evaluation.duplicates import near_duplicates
from lowmem_db.evaluation.encoders import Encoder
from tests.evaluation.conftest import PHOTOGRAPHS, SUBJECTS


def found(en0: Encoder, images: list[Image.Image]) -> list[tuple[str, str]]:
    names = [str(index) for index in range(len(images))]
    return [(one, other) for one, other, _ in near_duplicates(names, en0.embed_images(images))]


def photographs(subject: str) -> list[Image.Image]:
    return [read_photo(file) for file in sorted((PHOTOGRAPHS / subject).glob("*.jpg"))]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_different_photos_of_a_subject_are_no_duplicates(en0: Encoder, subject: str) -> None:
    assert found(en0, photographs(subject)) == []


def test_saved_again_mirrored_and_cropped_photos_are_found(en0: Encoder) -> None:
    one, other = photographs("dog3")[:2]
    saved = io.BytesIO()
    one.save(saved, format="JPEG", quality=60)
    changed = [Image.open(saved), ImageOps.mirror(one), one.crop((4, 4, 126, 126))]
    pairs = found(en0, [other, one, *changed])
    assert {("1", "2"), ("1", "3"), ("1", "4")} <= set(pairs)
    assert not any("0" in pair for pair in pairs)


def test_one_photo_has_no_duplicate(en0: Encoder) -> None:
    assert found(en0, photographs("dog3")[:1]) == []
