"""Learning rates, computed by hand."""

import math

import pytest

from lowmem_db.optimizers.schedules import learning_rate_factor


@pytest.mark.parametrize(
    ("scheduler", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 3, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
        ("cosine", 1, [1 / 2, 1, 3 / 4, 1 / 4]),
    ],
)
def test_factors_of_a_whole_run(scheduler: str, warmup: int, factors: list[float]) -> None:
    found = [
        learning_rate_factor(scheduler, step, max_train_steps=len(factors), lr_warmup_steps=warmup)
        for step in range(len(factors))
    ]
    assert found == pytest.approx(factors, abs=1e-12)


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_factor_is_zero_after_the_last_step_and_stays_there(scheduler: str) -> None:
    for step in (10, 11, 1000):
        assert learning_rate_factor(scheduler, step, max_train_steps=10, lr_warmup_steps=3) == pytest.approx(
            0, abs=1e-12
        )


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_no_step_of_a_run_is_lost_to_a_rate_of_zero(scheduler: str) -> None:
    for steps, warmup in [(1, 0), (2, 1), (800, 0), (800, 799)]:
        factors = [
            learning_rate_factor(scheduler, step, max_train_steps=steps, lr_warmup_steps=warmup)
            for step in range(steps)
        ]
        assert min(factors) > 0
        assert max(factors) == 1
