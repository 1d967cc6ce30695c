"""Learning rates as a pure function of the step: nothing to save, nothing to forget."""

import math
from collections.abc import Iterable
from typing import Literal

from lowmem_db.config.schema import Config

Course = Literal["constant", "linear", "cosine"]


def learning_rate_factor(course: Course, step: int, *, max_train_steps: int, lr_warmup_steps: int) -> float:
    """Return what the learning rate is multiplied by in one step.

    Args:
        course: What follows the linear warm-up: constant, linear to zero, or half a cosine to zero.
        step: Optimizer steps done before this one; the first step is 0.
        max_train_steps: Optimizer steps of the run.
        lr_warmup_steps: Steps of the warm-up; in step ``s`` of it the factor is (s + 1) / (lr_warmup_steps + 1).
    """
    if step < lr_warmup_steps:
        return (step + 1) / (lr_warmup_steps + 1)
    progress = (step - lr_warmup_steps) / max(1, max_train_steps - lr_warmup_steps)
    if course == "linear":
        return max(0.0, 1.0 - progress)
    if course == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def learning_rates(config: Config, components: Iterable[str], step: int) -> dict[str, float]:
    """Return the learning rate of each component in one step.

    A component without a field of its own, ``training.learning_rate_COMPONENT``, has the rate of the one before it; the
    first has ``training.learning_rate``.

    Args:
        config: The configuration.
        components: Components of the model, the denoiser first.
        step: Optimizer steps done before this one.
    """
    training = config.training
    factor = learning_rate_factor(
        training.lr_scheduler,
        step,
        max_train_steps=training.max_train_steps,
        lr_warmup_steps=training.lr_warmup_steps,
    )
    if training.scale_learning_rate:
        factor *= config.samples_per_step
    rates, rate = {}, training.learning_rate
    for component in components:
        rate = getattr(training, f"learning_rate_{component}", None) or rate
        rates[component] = rate * factor
    return rates
