"""Learning rates as a pure function of the step, without state."""

import math
from collections.abc import Iterable
from typing import Literal

from lowmem_db.config.schema import Config

Scheduler = Literal["constant", "linear", "cosine"]


def learning_rate_factor(scheduler: Scheduler, step: int, *, max_train_steps: int, lr_warmup_steps: int) -> float:
    """Return the factor for the learning rate in one step.

    Args:
        scheduler: What follows the linear warm-up: constant, linear to zero, or half a cosine to zero.
        step: Number of optimizer steps before this one; the first step is 0.
        max_train_steps: Number of optimizer steps of the run.
        lr_warmup_steps: Number of warm-up steps; in step ``s`` of them the factor is (s + 1) / (lr_warmup_steps + 1).
    """
    if step < lr_warmup_steps:
        return (step + 1) / (lr_warmup_steps + 1)
    progress = (step - lr_warmup_steps) / max(1, max_train_steps - lr_warmup_steps)
    if scheduler == "linear":
        return max(0.0, 1.0 - progress)
    if scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def learning_rates(config: Config, components: Iterable[str], step: int) -> dict[str, float]:
    """Return the learning rate of each component in one step.

    The first component uses ``training.learning_rate``; each other one ``training.learning_rate_COMPONENT`` or, if that
    is not set, the rate of the component before it. For Textual Inversion it is ``textual_inversion.learning_rate``.

    Args:
        config: The configuration.
        components: Components of the model, the denoiser first.
        step: Number of optimizer steps before this one.
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
    if config.textual_inversion.enabled:
        rate = config.textual_inversion.learning_rate
    for component in components:
        rate = getattr(training, f"learning_rate_{component}", None) or rate
        rates[component] = rate * factor
    return rates
