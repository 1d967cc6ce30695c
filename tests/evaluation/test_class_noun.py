"""Class nouns: where the classifier is sure, and where it is not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem_db.errors import DataError
from lowmem_db.evaluation.class_noun import NOUNS, SURE, _indices, class_noun, find_class_noun
from tests.evaluation.conftest import PHOTOGRAPHS


def rows(*shares: dict[int, float]) -> Tensor:
    """Probabilities: the given ones, and the rest on a class that no noun has."""
    found = torch.zeros(len(shares), 1000)
    for row, own in zip(found, shares, strict=True):
        row[999] = 1 - sum(own.values())
        for index, share in own.items():
            row[index] = share
    return found


def test_no_class_belongs_to_two_nouns() -> None:
    indices = [index for classes in NOUNS.values() for index in _indices(classes)]
    assert len({*indices}) == len(indices)
    assert 0 <= min(indices) <= max(indices) < 1000
    assert 999 not in indices


def test_breeds_and_photos_are_taken_together() -> None:
    found = class_noun(rows({151: 0.3, 207: 0.3, 281: 0.2}, {268: 0.5}))
    assert found.noun == "dog"
    assert [noun for noun, _ in found.guesses[:2]] == ["dog", "cat"]
    assert found.guesses[0][1] == pytest.approx(0.55)


def test_one_doubtful_photo_can_make_it_unsure() -> None:
    assert class_noun(rows({151: 1.0})).noun == "dog"
    unsure = class_noun(rows({151: 2 * SURE - 0.05}, {}))
    assert unsure.noun is None
    assert unsure.guesses[0][0] == "dog"
    assert len(unsure.guesses) == 3


@pytest.mark.parametrize(("subject", "noun"), [("dog3", "dog"), ("bear_plushie", None), ("robot_toy", None)])
def test_photos_of_the_papers_subjects_at_128_pixels(subject: str, noun: str | None) -> None:
    assert find_class_noun(PHOTOGRAPHS / subject).noun == noun


def test_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"PHOTOS: .* is empty"):
        find_class_noun(tmp_path)
