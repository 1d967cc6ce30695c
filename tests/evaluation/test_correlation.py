"""How metrics go with answers: planted answers, and those to other images."""

import math
from pathlib import Path

import numpy as np
import pytest

from lowmem_db.data.photos import read_photo
from lowmem_db.errors import DataError
from lowmem_db.evaluation.correlation import correlate, correlation_rows, pearson
from lowmem_db.evaluation.encoders import Encoder
from lowmem_db.evaluation.folders import Limits, find_subjects
from lowmem_db.evaluation.metrics import fidelity_pairs
from lowmem_db.evaluation.questionnaire import StudyRequest, find_pairs, write_studies
from tests.evaluation.conftest import CPU, PHOTOGRAPHS, write_images
from tests.evaluation.test_questionnaire import NAMES, answer

EVERYTHING = Limits()
REAL = PHOTOGRAPHS / "dog3"


def test_coefficient_is_numpys_and_the_papers_p_value_fits_its_number_of_images() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=1200)
    shares = 0.34 * scores + random.normal(size=1200)
    found = pearson(list(scores), list(shares))
    assert found.value == pytest.approx(np.corrcoef(scores, shares)[0, 1])
    assert found.interval[0] < found.value < found.interval[1]
    moved = math.atanh(0.32) * math.sqrt(1200 - 3)
    assert 1e-31 < math.erfc(moved / math.sqrt(2)) < 1e-28  # the paper: 0.32, 9.44e-30


@pytest.mark.parametrize("shares", [[0.5] * 6, []])
def test_too_little_is_refused(shares: list[float]) -> None:
    with pytest.raises(DataError, match="say nothing"):
        pearson(list(range(len(shares))), shares)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write_images(tmp_path / name, ["a", "b", "c"], 2, seed=seed) for seed, name in enumerate(NAMES)]


def answers_of(folders: list[Path], output: Path, en0: Encoder, *, agree: bool) -> list[Path]:
    """Answers of people who always prefer the image that is nearer to the photos, or always the other one."""
    request = StudyRequest(kinds=("subject",), num_pairs=3, num_questionnaires=2, seed=5)
    pages = write_studies(folders, REAL, EVERYTHING, output, request)
    pairs = find_pairs(*(find_subjects(each, REAL, None, EVERYTHING) for each in folders), num_pairs=6, seed=5)
    choices = {}
    for index, pair in enumerate(pairs):
        photos = en0.embed_images([read_photo(file) for file in pair.subject.photos])
        drawn = [en0.embed_images([read_photo(file)]) for file in pair.files]
        one, other = (float(values.mean()) for values in fidelity_pairs(drawn, photos))
        choices[f"subject-{index:03d}"] = NAMES[(one > other) != agree]
    halves = [dict(list(choices.items())[start : start + 3]) for start in (0, 3)]
    return [answer(page, output, f"rater{page.stem}", half) for (page, _), half in zip(pages, halves, strict=True)]


def test_answers_are_matched_with_the_images_that_people_saw(folders: list[Path], tmp_path: Path, en0: Encoder) -> None:
    ours, others = (
        answers_of(folders, tmp_path / name, en0, agree=agree) for name, agree in (("x", True), ("y", False))
    )
    found, opposite = (
        correlate(files, folders, REAL, EVERYTHING, [en0.files], CPU)["subject"]["EN0-I"] for files in (ours, others)
    )
    assert found["num_images"] == opposite["num_images"] == 12
    assert found["value"] == pytest.approx(-opposite["value"])
    assert found["value"] > 0.3
    header, row = correlation_rows({"subject": {"EN0-I": found}})
    assert (header[0], row[:2], row[-1]) == ("study", ["subject fidelity", "EN0-I"], "-")
    with pytest.raises(DataError, match="compare other images"):
        correlate(ours, folders[::-1], REAL, EVERYTHING, [en0.files], CPU)
