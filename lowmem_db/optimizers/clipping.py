"""Gradient clipping, and the loss scaling that keeps fp16 gradients from vanishing.

Everything is computed on the device, without synchronization.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowmem_db.config.schema import Clipping

_LAGGED_DECAY = 0.9
_FIRST_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000


class GradientClipping:
    """Scales gradients by their norms; its state is part of the optimizer's.

    Args:
        mode: What is clipped.
        max_norm: Largest norm, or None if the mode needs none.
        device: Device of the gradients.
    """

    def __init__(self, mode: Clipping, max_norm: float | None, device: torch.device) -> None:
        self.mode = mode
        self.max_norm = max_norm
        self.average_norm = torch.zeros((), device=device)
        self._lagged_scale: Tensor | None = None  # the same for all gradients of a step

    def scale(self, norm: Tensor | None) -> Tensor | None:
        """Return the factor for a gradient, or None for no scaling.

        Args:
            norm: Norm of the gradient for ``per_tensor``, of all gradients for ``global``; otherwise not used.
        """
        if self.mode == "lagged":
            if self._lagged_scale is None:
                self._lagged_scale = self._limited(self.average_norm)
            return self._lagged_scale
        return self._limited(norm) if self.mode in {"global", "per_tensor"} else None

    def update(self, norm: Tensor) -> None:
        """Record the joint norm of a step, unless it is infinite or NaN."""
        if self.mode == "lagged":
            decay = torch.where(self.average_norm > 0, _LAGGED_DECAY, 0.0)
            average = decay * self.average_norm + (1.0 - decay) * norm
            self.average_norm.copy_(torch.where(norm.isfinite(), average, self.average_norm))
            self._lagged_scale = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""
        return {"average_norm": self.average_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.average_norm.copy_(state["average_norm"])
        self._lagged_scale = None

    def _limited(self, norm: Tensor | None) -> Tensor:
        assert norm is not None, f"clipping {self.mode} needs a norm"
        assert self.max_norm is not None, f"clipping {self.mode} needs max_norm"
        return (self.max_norm / norm).clamp(max=1.0)


class LossScale:
    """Loss scaling for fp16 (arXiv:1710.03740, section 3.2), like torch's GradScaler, but without synchronization.

    Args:
        device: Device of the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), _FIRST_SCALE, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, *, found_nonfinite: Tensor) -> None:
        """Halve the scale after a step with an infinite or NaN gradient; double it after 2000 steps without.

        Args:
            found_nonfinite: fp32 scalar, 1 or 0.
        """
        torch._amp_update_scale_(self.value, self.good_steps, found_nonfinite, 2.0, 0.5, _GROWTH_INTERVAL)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the scale and the number of steps since it changed."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.value.copy_(state["value"])
        self.good_steps.copy_(state["good_steps"])
