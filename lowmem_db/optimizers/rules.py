"""The interface of an optimizer's arithmetic on one parameter; the handle decides how and when it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lowmem_db_kernels.adamw8bit_state import scale_of_squares
from torch import Tensor

from lowmem_db.optimizers.states import StateTensor


@dataclass(frozen=True)
class Sums:
    """Sums over the whole of a parameter of which each process steps some rows.

    Attributes:
        count: Elements of the whole.
        total: Returns the sum over all processes of what each has summed up.
    """

    count: int
    total: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepScalars:
    """What a step depends on besides the tensors.

    Attributes:
        learning_rate: fp32 scalar on the device.
        step: Number of the step, from 1; int64 scalar on the device.
        host_learning_rate: The learning rate as a number.
        host_step: The step number as a number.
        gradient_scale: Factor for the gradient, an fp32 scalar on the device. Default: 1.
        clip_update: Whether the update of each tensor is scaled down to a root mean square of at most 1.
        sums: Sums over the whole of a parameter that is shared out. Default: the parameter is whole.
    """

    learning_rate: Tensor
    step: Tensor
    host_learning_rate: float
    host_step: int
    gradient_scale: Tensor | None
    clip_update: bool
    sums: Sums | None = None


@runtime_checkable
class UpdateRule(Protocol):
    """The arithmetic of an optimizer.

    Attributes:
        reports_norm: Whether :meth:`step` returns the square of the gradient's norm.
    """

    reports_norm: bool

    def state_tensors(self, parameter: Tensor, *, small: bool) -> Sequence[StateTensor]:
        """Return the state of one parameter, without extra bits; all zero before the first step.

        Args:
            parameter: The parameter.
            small: Whether it is a row of all small parameters; then every tensor has one element per element of it.
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
        """Update one parameter and its state in place; the gradient may be overwritten.

        If ``reports_norm`` is true, a gradient scale of NaN leaves everything unchanged.
        """
        ...


def update_scale(update: Tensor, sums: Sums | None) -> Tensor:
    """Return the factor that limits an update to a root mean square of 1 (arXiv:1804.04235, section 6, with d = 1)."""
    squares = update.square().sum()
    if sums is None:
        return scale_of_squares(squares, update.numel())
    return scale_of_squares(sums.total(squares), sums.count)
