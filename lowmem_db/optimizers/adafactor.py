"""Adafactor without momentum (arXiv:1804.04235, Algorithm 4): second moments factored into a row and a column.

Convolutions are flattened to (out, in * height * width) before they are factored. Other implementations factor the last
two dimensions, which are only the 3 x 3 taps. Stable Diffusion 1.5 then has 5.7 MiB of state. The learning rate is used
as configured, without the paper's relative step size.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from lowmem_db_kernels.adamw8bit_state import scale_of_squares
from torch import Tensor

from lowmem_db.config.schema import OptimizerConfig
from lowmem_db.optimizers.rules import StepScalars
from lowmem_db.optimizers.states import StateTensor, flat
from lowmem_db.optimizers.weights import EXTRA_BITS, stepped_in_fp32

_EPSILON = 1e-30  # epsilon 1 of the paper
_DECAY_POWER = -0.8  # section 7.2 of the paper: beta2 at step t is 1 - t^-0.8
_CHUNK = 1 << 22  # elements processed at once, which bounds the temporaries


class Adafactor:
    """Adafactor, with a few bytes of state per row and column.

    Args:
        config: The section ``optimizer``; its betas and epsilon are not used.
    """

    reports_norm = False

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    def state_tensors(self, parameter: Tensor, *, small: bool) -> Sequence[StateTensor]:
        """Return the row and column means of the second moments, or all moments for vectors and small parameters."""
        if small or parameter.ndim < 2:
            return [flat("exp_avg_sq", parameter.numel())]
        rows = parameter.shape[0]
        return [flat("exp_avg_sq_row", rows), flat("exp_avg_sq_col", parameter.numel() // rows)]

    def step(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        scalars: StepScalars,
        *,
        rounding_seed: int | None,
    ) -> None:
        """Update one parameter; see :class:`UpdateRule`."""
        rows = gradient.reshape(parameter.shape[0] if "exp_avg_sq_row" in state else 1, -1)
        decay = 1.0 - scalars.host_step**_DECAY_POWER
        update = _Update(rows, state, decay, scalars.gradient_scale)
        scale = scale_of_squares(update.sum_of_squares(), parameter.numel()) if scalars.clip_update else 1.0
        rounding = {"rounding_seed": rounding_seed, "step": scalars.step}
        with stepped_in_fp32(parameter, state.get(EXTRA_BITS), **rounding) as weight:
            matrix = weight.reshape(rows.shape)
            for part, direction in update.parts(matrix):
                part.sub_((direction * scale + self.config.weight_decay * part) * scalars.learning_rate)
            if not weight.is_contiguous():  # the matrix is a copy
                weight.copy_(matrix.view_as(weight))


class _Update:
    """The update of one parameter, computed part by part; creating it updates the second moments.

    Args:
        gradient: ``(rows, columns)``.
        state: Second moments, updated in place.
        decay: Decay of the second moments in this step.
        gradient_scale: Factor for the gradient.
    """

    def __init__(
        self, gradient: Tensor, state: Mapping[str, Tensor], decay: float, gradient_scale: Tensor | None
    ) -> None:
        self._gradient = gradient
        self._scale = gradient_scale
        self._rows_at_once = max(1, _CHUNK // gradient.shape[1])
        if "exp_avg_sq" in state:
            self._row, self._col = gradient.new_ones(1, dtype=torch.float32), state["exp_avg_sq"]
            self._col.lerp_(self._squares(gradient)[0], 1.0 - decay)
            return
        self._row, self._col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row_means, col_sum = [], torch.zeros_like(self._col)
        for part in gradient.split(self._rows_at_once):
            squares = self._squares(part)
            row_means.append(squares.mean(1))
            col_sum += squares.sum(0)
        self._row.lerp_(torch.cat(row_means), 1.0 - decay)
        self._col.lerp_(col_sum / gradient.shape[0], 1.0 - decay)

    def sum_of_squares(self) -> Tensor:
        """Return the sum of squares of the update."""
        return torch.stack([direction.square().sum() for _, direction in self.parts(self._gradient)]).sum()

    def parts(self, matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of a matrix of the gradient's shape with the update of these rows, ``g / sqrt(r c / mean(r))``."""
        row_factor = (self._row / self._row.mean()).rsqrt()
        col_factor = self._col.rsqrt()
        for part, gradient, factor in zip(
            matrix.split(self._rows_at_once),
            self._gradient.split(self._rows_at_once),
            row_factor.split(self._rows_at_once),
            strict=True,
        ):
            yield part, self._scaled(gradient) * factor[:, None] * col_factor

    def _squares(self, gradient: Tensor) -> Tensor:
        return self._scaled(gradient).square() + _EPSILON

    def _scaled(self, gradient: Tensor) -> Tensor:
        return gradient.float() if self._scale is None else gradient.float() * self._scale
