"""Learning rates, computed by hand, and those of diffusers."""

import math

import pytest
import torch
from diffusers.optimization import get_scheduler

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import TrainingConfig
from lowmem_db.optimizers.schedules import learning_rate_factor, learning_rates

FALLING = ["linear", "cosine", "cosine_with_restarts", "polynomial"]


def factors(scheduler: str, *, steps: int, warmup: int = 0, until: int | None = None, **fields: object) -> list[float]:
    training = TrainingConfig(lr_scheduler=scheduler, max_train_steps=steps, lr_warmup_steps=warmup, **fields)
    return [learning_rate_factor(training, step) for step in range(until or steps)]


@pytest.mark.parametrize(
    ("scheduler", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 3, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ("constant_with_warmup", 3, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
        ("cosine", 1, [1 / 2, 1, 3 / 4, 1 / 4]),
    ],
)
def test_factors_of_a_whole_run(scheduler: str, warmup: int, expected: list[float]) -> None:
    assert factors(scheduler, steps=len(expected), warmup=warmup) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scheduler", FALLING)
def test_factor_stays_where_it_is_after_the_last_step(scheduler: str) -> None:
    last = factors(scheduler, steps=10, warmup=3, until=20)[10:]
    assert last == pytest.approx([1e-7 / 5e-6 if scheduler == "polynomial" else 0] * 10, abs=1e-12)


@pytest.mark.parametrize("scheduler", ["constant", "constant_with_warmup", *FALLING])
def test_no_step_of_a_run_is_lost_to_a_rate_of_zero(scheduler: str) -> None:
    for steps, warmup in [(1, 0), (2, 1), (800, 0), (800, 799)]:
        of_run = factors(scheduler, steps=steps, warmup=warmup)
        assert min(of_run) > 0
        assert max(of_run) == 1


@pytest.mark.parametrize("warmup", [0, 1, 7, 30])
@pytest.mark.parametrize(
    ("scheduler", "fields"),
    [
        ("constant_with_warmup", {}),
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"lr_num_cycles": 1}),
        ("cosine_with_restarts", {"lr_num_cycles": 3}),
        ("polynomial", {"lr_power": 1.0}),
        ("polynomial", {"lr_power": 2.5}),
    ],
)
def test_rates_are_those_of_diffusers(scheduler: str, fields: dict[str, float], warmup: int) -> None:
    """Number by number, with a warm-up that is over within the run or not."""
    steps, rate, rate_of_text_encoder = 20, 4e-5, 1e-5
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": rate_of_text_encoder}]
    optimizer = torch.optim.SGD(groups, lr=rate)
    options = {name.removeprefix("lr_"): value for name, value in fields.items()}
    theirs = get_scheduler(scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps, **options)
    config = load_config(
        None,
        [
            ("model.base", "demo"), ("subject.instance_dir", "photos"), ("subject.instance_prompt", "a sks dog"),
            ("output_dir", "run"), ("prior.enabled", False), ("training.train_text_encoder", True),
            ("training.max_train_steps", steps), ("training.lr_scheduler", scheduler),
            ("training.lr_warmup_steps", warmup), ("training.lr_warmup_from_zero", True),
            ("training.learning_rate", rate), ("training.learning_rate_text_encoder", rate_of_text_encoder),
            *((f"training.{name}", value) for name, value in fields.items()),
        ],
    )  # fmt: skip
    for step in range(steps + 1):
        ours = learning_rates(config, ["unet", "text_encoder"], step)
        assert list(ours.values()) == pytest.approx(theirs.get_last_lr(), rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_polynomial_decay_ends_at_a_rate_also_if_rates_are_scaled() -> None:
    training = TrainingConfig(lr_scheduler="polynomial", max_train_steps=2, learning_rate=1e-5)
    assert learning_rate_factor(training, 2, 4e-5) * 4e-5 == pytest.approx(1e-7)
