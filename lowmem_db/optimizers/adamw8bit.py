"""AdamW with 8-bit states (arXiv:2110.02861), in the format of bitsandbytes.

The fused step of ``lowmem_db_kernels`` is used if it is compiled; on a CUDA device without Triton bitsandbytes is used
where possible; otherwise the eager twin. All three write the same states.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lowmem_db_kernels import AdamW8bitState, adamw8bit_step, bias_corrections
from lowmem_db_kernels.adamw8bit_state import scale_of_squares
from lowmem_db_kernels.codec import BLOCK_SIZE, dynamic_map
from lowmem_db_kernels.dispatch import choose
from torch import Tensor

from lowmem_db import environment
from lowmem_db.config.schema import OptimizerConfig
from lowmem_db.optimizers.rules import StepScalars
from lowmem_db.optimizers.states import StateTensor, flat, like
from lowmem_db.optimizers.weights import EXTRA_BITS
from lowmem_db.side_streams import current_stream_id

_ABSMAX = ("absmax1", "absmax2")


class AdamW8bit:
    """8-bit AdamW, with about two bytes of state per parameter.

    Args:
        config: The section ``optimizer``.
        device: Device of the parameters.
        leaves_out_overflow: Whether a gradient scale of NaN must leave a parameter unchanged; rules out bitsandbytes.
    """

    def __init__(self, config: OptimizerConfig, device: torch.device, *, leaves_out_overflow: bool = False) -> None:
        self.config = config
        self._bitsandbytes: Any = None if leaves_out_overflow else _bitsandbytes_for(device)
        self._maps = [dynamic_map(signed=signed).to(device) for signed in (True, False)] if self._bitsandbytes else []
        self.reports_norm = self._bitsandbytes is None
        self._corrections: dict[tuple[int, int], Tensor] = {}

    def state_tensors(self, parameter: Tensor, *, small: bool) -> Sequence[StateTensor]:
        """Return 8-bit moments with the maxima of their blocks, or fp32 moments for small parameters."""
        if small:
            return [like(parameter, name, torch.float32) for name in ("state1", "state2")]
        num_blocks = -(-parameter.numel() // BLOCK_SIZE)
        moments = [like(parameter, name, torch.uint8) for name in ("state1", "state2")]
        return [*moments, *(flat(name, num_blocks) for name in _ABSMAX)]

    def step(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        scalars: StepScalars,
        *,
        rounding_seed: int | None,
    ) -> Tensor | None:
        """Update one parameter; see :class:`UpdateRule`."""
        if self._bitsandbytes is not None and _bitsandbytes_can(parameter, state, scalars):
            self._step_with_bitsandbytes(parameter, gradient, state, scalars)
            return None
        moments = AdamW8bitState(state["state1"], state["state2"], state.get("absmax1"), state.get("absmax2"))
        arguments: dict[str, Any] = {
            "lr": scalars.learning_rate,
            "step": scalars.step,
            "betas": (self.config.beta1, self.config.beta2),
            "corrections": self._corrections_of(scalars),
            "eps": self.config.epsilon,
            "weight_decay": self.config.weight_decay,
            "extra_bits": state.get(EXTRA_BITS),
            "rounding_seed": rounding_seed,
            "grad_scale": scalars.gradient_scale,
        }
        if scalars.clip_update:
            sums = adamw8bit_step(parameter, gradient, moments, **arguments, dry_run=True)
            if scalars.sums is None:
                arguments["update_squares"] = sums[1]
            else:
                arguments["update_scale"] = scale_of_squares(scalars.sums.total(sums[1]), scalars.sums.count)
        return adamw8bit_step(parameter, gradient, moments, **arguments)[0]

    def _corrections_of(self, scalars: StepScalars) -> Tensor:
        """Return the bias corrections of a step, computed once for all parameters that a stream steps."""
        key = scalars.host_step, current_stream_id(scalars.step.device)
        if key not in self._corrections:
            of_step = {known: found for known, found in self._corrections.items() if known[0] == scalars.host_step}
            made = bias_corrections(scalars.step, (self.config.beta1, self.config.beta2))
            self._corrections = of_step | {key: made}
        return self._corrections[key]

    def _step_with_bitsandbytes(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], scalars: StepScalars
    ) -> None:
        if scalars.gradient_scale is not None:
            gradient.mul_(scalars.gradient_scale)
        config = self.config
        self._bitsandbytes.functional.optimizer_update_8bit_blockwise(
            "adam", gradient, parameter, state["state1"], state["state2"], config.beta1, config.beta2, 0.0, 0.0,
            config.epsilon, scalars.host_step, scalars.host_learning_rate, *self._maps,
            state["absmax1"], state["absmax2"], weight_decay=config.weight_decay, gnorm_scale=1.0, skip_zeros=False,
        )  # fmt: skip


def _bitsandbytes_for(device: torch.device) -> Any:
    """Return bitsandbytes if it is needed: on a CUDA device without the compiled fused step."""
    if device.type != "cuda" or not environment.is_installed("bitsandbytes"):
        return None
    return None if choose("adamw8bit_step", device).backend != "eager" else environment.require("bitsandbytes")


def _bitsandbytes_can(parameter: Tensor, state: Mapping[str, Tensor], scalars: StepScalars) -> bool:
    return parameter.dtype == torch.float32 and "absmax1" in state and not scalars.clip_update
