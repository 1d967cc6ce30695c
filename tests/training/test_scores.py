"""The best step and the end of patience follow from the rows alone."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.scores import Scores


def scores_of(folder: Path, values: list[float], patience: int | None = None) -> Scores:
    run = RunFolder(folder)
    run.scores_file.unlink(missing_ok=True)
    scores = Scores(run, patience)
    for number, value in enumerate(values, 1):
        scores.add(10 * number, {"score": value})
    return scores


@pytest.mark.parametrize(
    ("values", "best"), [([], None), ([0.1], 10), ([0.1, 0.3, 0.2], 20), ([0.3, 0.3], 10), ([-1.0, -0.5], 20)]
)
def test_best_is_the_first_of_the_greatest(tmp_path: Path, values: list[float], best: int | None) -> None:
    assert scores_of(tmp_path, values).best_step() == best


@pytest.mark.parametrize(
    ("values", "patience", "stops"),
    [
        ([], 1, False),
        ([0.1], 1, False),
        ([0.2, 0.1], 1, True),
        ([0.2, 0.1], 2, False),
        ([0.2, 0.1, 0.2], 2, True),
        ([0.2, 0.1, 0.3, 0.1], 2, False),
        ([0.2, 0.1, 0.1, 0.1], None, False),
    ],
)
def test_patience(tmp_path: Path, values: list[float], patience: int | None, stops: bool) -> None:
    assert scores_of(tmp_path, values, patience).out_of_patience() is stops


@given(values=st.lists(st.floats(-1, 1), min_size=1, max_size=8), kept=st.integers(1, 8))
def test_scores_of_a_resumed_run_decide_as_those_before(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], kept: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    whole = scores_of(folder, values, patience=2)
    decided = whole.best_step(), whole.out_of_patience()
    RunFolder(folder).truncate_rows(10 * kept)
    again = Scores(RunFolder(folder), 2)
    assert all(again.has(10 * number) is (number <= kept) for number in range(1, len(values) + 1))
    for number, value in list(enumerate(values, 1))[kept:]:
        again.add(10 * number, {"score": value})
    assert (again.best_step(), again.out_of_patience()) == decided
