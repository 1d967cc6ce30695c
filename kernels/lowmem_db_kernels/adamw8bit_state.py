"""State of `adamw8bit_step`, in bitsandbytes' format (blocks of 256 codes with an fp32 maximum), and its operands."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import cdiv
from .codec import BLOCK_SIZE, dynamic_map

MINIMUM_8BIT_SIZE = 4096


class AdamW8bitState(NamedTuple):
    """The state of one parameter, in storage order.

    Attributes:
        state1: First moments: uint8 codes, or fp32 for a small parameter; with the parameter's strides.
        state2: Second moments, in the same form.
        absmax1: fp32 absolute maximum of each block of 256 first moments; None for a small parameter.
        absmax2: The same for the second moments.
    """

    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None


class StepOperands(NamedTuple):
    """Operands of the operator and of its twins.

    Attributes:
        param: As in `adamw8bit_step`.
        extra_bits: As in `adamw8bit_step`.
        grad: As in `adamw8bit_step`.
        state1: As in `AdamW8bitState`.
        state2: As in `AdamW8bitState`.
        absmax1: As in `AdamW8bitState`.
        absmax2: As in `AdamW8bitState`.
        lr: fp32 scalar.
        step: int64 scalar.
        corrections: From `bias_corrections`.
        grad_scale: As in `adamw8bit_step`.
        update_scale: As in `adamw8bit_step`.
        beta1: First of the betas.
        beta2: Second of the betas.
        eps: As in `adamw8bit_step`.
        weight_decay: As in `adamw8bit_step`.
        seed_low: Low word of the rounding seed, as a signed integer.
        seed_high: High word of the rounding seed, as a signed integer.
        dry_run: As in `adamw8bit_step`.
        update_squares: As in `adamw8bit_step`.
    """

    param: Tensor
    extra_bits: Tensor | None
    grad: Tensor
    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None
    lr: Tensor
    step: Tensor
    corrections: Tensor
    grad_scale: Tensor | None
    update_scale: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    seed_low: int
    seed_high: int
    dry_run: bool
    update_squares: Tensor | None = None

    @property
    def state(self) -> AdamW8bitState:
        """The state of the parameter."""
        return AdamW8bitState(self.state1, self.state2, self.absmax1, self.absmax2)


def scale_of_squares(sum_of_squares: Tensor, count: int) -> Tensor:
    """Return the factor that limits the root mean square to 1 (arXiv:1804.04235, section 6, with d = 1).

    Args:
        sum_of_squares: fp32 scalar.
        count: How many squares were added.
    """
    return (sum_of_squares / count).sqrt().clamp(min=1.0).reciprocal()


def init_state(param: Tensor) -> AdamW8bitState:
    """Return the state of a parameter before its first step.

    Args:
        param: The parameter.

    Returns:
        Zero moments, with 8 bits per moment from 4096 elements on.
    """
    if param.numel() < MINIMUM_8BIT_SIZE:
        zeros = torch.zeros_like(param, dtype=torch.float32)
        return AdamW8bitState(zeros, zeros.clone(), None, None)
    absmax = torch.zeros(cdiv(param.numel(), BLOCK_SIZE), dtype=torch.float32, device=param.device)
    # Code 127 is zero in the signed map; bitsandbytes starts with code 0, which a block maximum of 0 makes zero too.
    codes = torch.zeros_like(param, dtype=torch.uint8)
    return AdamW8bitState(codes, codes.clone(), absmax, absmax.clone())


def to_bitsandbytes(state: AdamW8bitState, step: int) -> dict[str, Tensor | int]:
    """Convert a state to what bitsandbytes keeps in `optimizer.state[parameter]`.

    Args:
        state: The state of a contiguous parameter.
        step: Number of steps taken.

    Returns:
        The entries of an 8-bit blockwise state, or of a 32-bit state.
    """
    entries: dict[str, Tensor | int] = {"step": step, "state1": state.state1, "state2": state.state2}
    if state.absmax1 is not None and state.absmax2 is not None:
        device = state.state1.device
        entries |= {"qmap1": dynamic_map(signed=True).to(device), "absmax1": state.absmax1}
        entries |= {"qmap2": dynamic_map(signed=False).to(device), "absmax2": state.absmax2}
    return entries


def from_bitsandbytes(entries: dict) -> tuple[AdamW8bitState, int]:
    """Convert a state of bitsandbytes.

    Args:
        entries: `optimizer.state[parameter]` of `AdamW8bit`.

    Returns:
        The state, sharing the tensors, and the number of steps taken.

    Raises:
        ValueError: The state uses another 8-bit map.
    """
    for name, signed in (("qmap1", True), ("qmap2", False)):
        if name in entries and not torch.equal(entries[name].cpu(), dynamic_map(signed=signed)):
            raise ValueError(f"{name} is not the dynamic map; only AdamW8bit with block-wise states can be read")
    state = AdamW8bitState(entries["state1"], entries["state2"], entries.get("absmax1"), entries.get("absmax2"))
    return state, int(entries["step"])


def bias_corrections(step: Tensor, betas: tuple[float, float]) -> Tensor:
    """Compute the bias corrections of one step, in float64 and without synchronization.

    Args:
        step: Number of the step, from 1: an integer scalar.
        betas: Decay rates of the moments.

    Returns:
        fp32 `(2,)`: `1 - beta1^step` and the square root of `1 - beta2^step`.
    """
    logarithms = torch.full((2,), math.log(betas[0]), dtype=torch.float64, device=step.device)
    logarithms[1] = math.log(betas[1])
    corrections = -torch.expm1(step * logarithms)
    corrections[1] = corrections[1].sqrt()
    return corrections.to(torch.float32)
