"""What an optimizer does to one parameter, behind one interface; how and when is the handle's business."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lowmem_db.optimizers.states import StateTensor


@dataclass(frozen=True, kw_only=True)
class StepScalars:
    """What a step depends on beside the tensors.

    Attributes:
        learning_rate: fp32 scalar on the device.
        step: Number of the step, from 1, int64 scalar on the device.
        host_learning_rate: The learning rate as a number.
        host_step: The number of the step as a number.
        gradient_scale: fp32 scalar on the device that multiplies the gradient; None: 1.
        clip_update: Scale the update of each tensor down to a root mean square of 1.
    """

    learning_rate: Tensor
    step: Tensor
    host_learning_rate: float
    host_step: int
    gradient_scale: Tensor | None
    clip_update: bool


@runtime_checkable
class UpdateRule(Protocol):
    """The arithmetic of an optimizer.

    Attributes:
        reports_norm: Whether :meth:`step` returns the square of the gradient's norm.
    """

    reports_norm: bool

    def state_tensors(self, parameter: Tensor, *, small: bool) -> Sequence[StateTensor]:
        """Return the state of one parameter, extra bits left out; all zero before the first step.

        Args:
            parameter: The parameter.
            small: Whether it stands for all small ones in a row: every tensor then has an element per element of it.
        """
        ...

    def step(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        scalars: StepScalars,
        *,
        rounding_seed: int | None,
    ) -> Tensor | None:
        """Step one parameter and its state in place; the gradient may be overwritten.

        A gradient scale of NaN leaves everything as it is where ``reports_norm`` is true.
        """
        ...


def update_scale(update: Tensor) -> Tensor:
    """Return what scales an update down to a root mean square of 1 (arXiv:1804.04235, section 6, with d = 1)."""
    return mean_square_scale(update.square().sum(), update.numel())


def mean_square_scale(sum_of_squares: Tensor, count: int) -> Tensor:
    """Return the scale of :func:`update_scale` from a sum of squares."""
    return 1.0 / (sum_of_squares / count).sqrt().clamp(min=1.0)
