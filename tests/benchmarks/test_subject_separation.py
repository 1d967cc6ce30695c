import numpy as np
import pytest
import torch

from benchmarks.quality.subject_separation import centred_cosines, separation
from lowmem_db.evaluation.metrics import cosine_similarities

LABELS = np.array(["a", "a", "b", "b", "c", "c"])


def test_what_a_class_has_in_common_makes_no_difference() -> None:
    features = torch.eye(3, 8).repeat_interleave(2, dim=0) + 0.2 * torch.arange(48).reshape(6, 8).sin()
    common = features + 9
    assert separation(cosine_similarities(common, common).numpy(), LABELS)["cosine_different"] > 0.9
    assert centred_cosines(common, LABELS) == pytest.approx(centred_cosines(features, LABELS), abs=1e-5)


def test_centres_leave_out_the_subjects_that_are_compared() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [5.0, 5.0], [7.0, 7.0]])
    cosines = centred_cosines(features, LABELS)
    assert cosines[0, 2] == pytest.approx(60 / 61)  # both less the mean of c, (6, 6)
    assert cosines[0, 1] == pytest.approx(1)
    assert np.allclose(cosines, cosines.T)
