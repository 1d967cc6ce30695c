"""Can these weights learn at this learning rate? Asked before a training run, answered from the formats alone."""

from typing import Literal

import torch
from torch import Tensor

WeightFormat = Literal["fp32", "bf16_extra_bits", "bf16_stochastic", "bf16"]
# Fraction bits of the format; stochastic rounding resolves 16 more in the mean.
_FRACTION_BITS = {"fp32": 23, "bf16_extra_bits": 15, "bf16_stochastic": 7 + 16, "bf16": 7}


class FrozenWeightsError(ValueError):
    """The learning rate cannot move enough of the weights."""


def movable_fraction(weights: Tensor, lr: float, weight_format: WeightFormat) -> float:
    """Return the share of weights that an update of size `lr` changes.

    The normalized update of Adam is of size one, so a step is about the learning rate. A weight moves where that is at
    least half the distance to the next representable number.

    Args:
        weights: Any floating type and shape.
        lr: Learning rate.
        weight_format: How the weights are stored while they train.

    Returns:
        In [0, 1].
    """
    exponent = torch.frexp(weights.detach().to(torch.float32)).exponent
    half_spacing = torch.ldexp(
        torch.ones_like(exponent, dtype=torch.float32), exponent - 2 - _FRACTION_BITS[weight_format]
    )
    return (half_spacing <= lr).to(torch.float32).mean().item()


def check_learning_rate(weights: Tensor, lr: float, weight_format: WeightFormat, *, minimum: float = 0.5) -> float:
    """Refuse a learning rate that the weights' format rounds away.

    Args:
        weights: As in `movable_fraction`.
        lr: Learning rate.
        weight_format: As in `movable_fraction`.
        minimum: The smallest share of weights that must be able to move.

    Returns:
        The share that can move.

    Raises:
        FrozenWeightsError: Fewer can.
    """
    fraction = movable_fraction(weights, lr, weight_format)
    if fraction < minimum:
        raise FrozenWeightsError(
            f"at learning rate {lr:g} only {fraction:.1%} of the {weight_format} weights can move"
            f" (minimum {minimum:.0%}); use fp32, 8 extra bits, stochastic rounding or a larger learning rate"
        )
    return fraction
