"""AdamW with fp32 states (arXiv:1711.05101, Algorithm 2)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowmem_db.config.schema import OptimizerConfig
from lowmem_db.optimizers.rules import StepScalars, update_scale
from lowmem_db.optimizers.states import StateTensor, like
from lowmem_db.optimizers.weights import EXTRA_BITS, stepped_in_fp32


class AdamW:
    """AdamW, with eight bytes of state per parameter; uses torch's fused step unless the update is clipped.

    Args:
        config: The section ``optimizer``.
    """

    reports_norm = False

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    def state_tensors(self, parameter: Tensor, *, small: bool) -> Sequence[StateTensor]:
        """Return the first and second moments."""
        return [like(parameter, name, torch.float32) for name in ("exp_avg", "exp_avg_sq")]

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
        gradient = gradient.float()
        if scalars.gradient_scale is not None:
            gradient.mul_(scalars.gradient_scale)
        rounding = {"rounding_seed": rounding_seed, "step": scalars.step}
        with stepped_in_fp32(parameter, state.get(EXTRA_BITS), **rounding) as weight:
            step = self._clipped_step if scalars.clip_update else self._fused_step
            step(weight, gradient, state["exp_avg"], state["exp_avg_sq"], scalars)

    def _fused_step(
        self, weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: StepScalars
    ) -> None:
        config = self.config
        adamw(
            [weight], [gradient], [exp_avg], [exp_avg_sq], [], [scalars.step.float() - 1.0],
            fused=True, amsgrad=False, maximize=False, beta1=config.beta1, beta2=config.beta2,
            lr=scalars.host_learning_rate, weight_decay=config.weight_decay, eps=config.epsilon,
        )  # fmt: skip

    def _clipped_step(
        self, weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: StepScalars
    ) -> None:
        config, step = self.config, scalars.host_step
        exp_avg.lerp_(gradient, 1.0 - config.beta1)
        exp_avg_sq.mul_(config.beta2).addcmul_(gradient, gradient, value=1.0 - config.beta2)
        root = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - config.beta2**step)).add_(config.epsilon)
        update = root.reciprocal_().mul_(exp_avg).div_(1.0 - config.beta1**step)
        update.mul_(update_scale(update, scalars.sums)).add_(weight, alpha=config.weight_decay)
        weight.sub_(update.mul_(scalars.learning_rate))
