"""Learning rates as a pure function of the step, without state; the shapes are those of ``diffusers.optimization``."""

import math
from collections.abc import Callable, Iterable

from lowmem_db.config.schema import Config, TrainingConfig

_POLYNOMIAL_END = 1e-7
"""Learning rate after polynomial decay."""


def learning_rate_factor(training: TrainingConfig, step: int, learning_rate: float | None = None) -> float:
    """Return the factor for the learning rate in one step.

    In step ``s`` of ``N`` warm-up steps it is (s + 1) / (N + 1), or s / N with ``lr_warmup_from_zero``. Afterwards it
    depends on the progress from 0, at the end of the warm-up, to 1 after the last step.

    Args:
        training: The section of the configuration.
        step: Number of optimizer steps before this one; the first step is 0.
        learning_rate: What the factor is for; polynomial decay ends at a rate, not at a factor. Default: the
            learning rate of the section.
    """
    warmup = training.lr_warmup_steps
    if step < warmup:
        return step / warmup if training.lr_warmup_from_zero else (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, training.max_train_steps - warmup))
    return _DECAY[training.lr_scheduler](progress, training, learning_rate or training.learning_rate)


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
    scale = config.samples_per_step if training.scale_learning_rate else 1
    factor = scale * learning_rate_factor(training, step, scale * training.learning_rate)
    rates, rate = {}, training.learning_rate
    if config.textual_inversion.enabled:
        rate = config.textual_inversion.learning_rate
    for component in components:
        rate = getattr(training, f"learning_rate_{component}", None) or rate
        rates[component] = rate * factor
    return rates


def _constant(progress: float, training: TrainingConfig, learning_rate: float) -> float:
    del progress, training, learning_rate
    return 1.0


def _linear(progress: float, training: TrainingConfig, learning_rate: float) -> float:
    del training, learning_rate
    return 1.0 - progress


def _cosine(progress: float, training: TrainingConfig, learning_rate: float) -> float:
    del training, learning_rate
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _cosine_with_restarts(progress: float, training: TrainingConfig, learning_rate: float) -> float:
    if progress == 1.0:
        return 0.0
    return _cosine(training.lr_num_cycles * progress % 1.0, training, learning_rate)


def _polynomial(progress: float, training: TrainingConfig, learning_rate: float) -> float:
    end = _POLYNOMIAL_END / learning_rate
    return (1.0 - end) * (1.0 - progress) ** training.lr_power + end


_DECAY: dict[str, Callable[[float, TrainingConfig, float], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}
