"""Every metric against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch

from lowmem_db.evaluation.metrics import (
    cosine_distances,
    cosine_similarities,
    fidelity_pairs,
    preservation_pairs,
    prompt_pairs,
    real_pairs,
    summarise,
)

EAST, NORTH, NORTH_EAST, WEST = ([1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-4.0, 0.0])
DIAGONAL = math.sqrt(0.5)


def rows(*vectors: list[float]) -> torch.Tensor:
    return torch.tensor(vectors)


def numbers(pairs: list[torch.Tensor]) -> list[list[float]]:
    return [pytest.approx(values.tolist()) for values in pairs]


def test_cosines_ignore_lengths() -> None:
    found = cosine_similarities(rows(EAST, NORTH), rows(NORTH_EAST, WEST, EAST))
    assert found.tolist() == [pytest.approx([DIAGONAL, -1, 1]), pytest.approx([DIAGONAL, 0, 0])]


def test_fidelity_compares_every_image_with_every_photo() -> None:
    found = fidelity_pairs([rows(EAST), rows(NORTH, WEST)], rows(EAST, NORTH_EAST))
    assert numbers(found) == [[1, DIAGONAL], [0, DIAGONAL, -1, -DIAGONAL]]


def test_photos_are_compared_once_and_never_with_themselves() -> None:
    assert numbers(real_pairs(rows(EAST, NORTH, NORTH_EAST))) == [[0, DIAGONAL, DIAGONAL]]
    assert numbers(real_pairs(rows(EAST))) == [[]]


def test_prompt_fidelity_compares_images_with_their_own_prompt() -> None:
    found = prompt_pairs([rows(EAST, NORTH_EAST), rows(WEST)], rows(EAST, NORTH))
    assert numbers(found) == [[1, DIAGONAL], [0]]


def test_preservation_has_a_part_for_each_class_image() -> None:
    found = preservation_pairs(rows(EAST, NORTH), rows(EAST, NORTH_EAST))
    assert numbers(found) == [[1, DIAGONAL], [0, DIAGONAL]]


def test_diversity_is_the_distance_of_every_two() -> None:
    assert cosine_distances(rows(EAST, NORTH, WEST)).tolist() == pytest.approx([1, 2, 1])
    assert cosine_distances(rows(EAST, EAST)).tolist() == pytest.approx([0])
    assert cosine_distances(rows(EAST)).tolist() == []


def test_each_subject_counts_the_same_however_many_pairs_it_has() -> None:
    score = summarise({"a": [torch.tensor([0.2, 0.4]), torch.tensor([0.9])], "b": [torch.tensor([0.1])]})
    assert score.value == pytest.approx((0.5 + 0.1) / 2)
    assert (score.num_pairs, score.num_subjects) == (4, 2)


def test_nothing_to_compare_has_no_value() -> None:
    score = summarise({"a": [torch.zeros(0)], "b": []})
    assert score.as_json() == {"value": None, "interval": None, "num_pairs": 0, "num_subjects": 0}


def test_subject_without_pairs_is_left_out() -> None:
    score = summarise({"a": [torch.tensor([0.5])], "b": [torch.zeros(0)]})
    assert (score.value, score.num_subjects, score.interval) == (0.5, 1, None)


def test_interval_of_equal_values_is_that_value() -> None:
    score = summarise({"a": [torch.full((3,), 0.25), torch.full((2,), 0.25)], "b": [torch.full((1,), 0.25)]})
    assert score.interval == pytest.approx((0.25, 0.25))


def test_interval_is_that_of_the_mean() -> None:
    """For many subjects the percentile bootstrap agrees with 1.96 standard errors."""
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    score = summarise({str(index): [torch.tensor([value])] for index, value in enumerate(values)})
    error = 1.96 * values.std() / math.sqrt(400)
    assert score.interval == pytest.approx((values.mean() - error, values.mean() + error), abs=error / 5)


def test_prompts_are_drawn_within_a_single_subject() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    score = summarise({"a": [torch.tensor([value]) for value in values]})
    error = 1.96 * values.std() / math.sqrt(400)
    assert score.interval == pytest.approx((values.mean() - error, values.mean() + error), abs=error / 5)


def test_prompts_with_more_pairs_weigh_more() -> None:
    """Two prompts, drawn twice: only the first, both, only the second."""
    score = summarise({"a": [torch.zeros(1), torch.ones(99)]})
    assert score.value == pytest.approx(0.99)
    assert score.interval == pytest.approx((0.0, 1.0))


def test_same_seed_same_interval() -> None:
    pairs = {name: [torch.rand(3, generator=torch.Generator().manual_seed(ord(name)))] for name in "abcdefghijklm"}
    assert summarise(pairs, seed=1) == summarise(pairs, seed=1)
    assert summarise(pairs, seed=1).interval != summarise(pairs, seed=2).interval
