"""Weights kept as the memory engine keeps them, while the model computes in fp32.

The engine computes in bf16 where it keeps bf16 weights. On a CPU that takes minutes for a step, so that here only what
stays between steps is rounded: the weights the model sees are bf16 values, gradients are rounded to bf16, and the
optimizer steps the 24-bit weights, or rounds stochastically. Activations are not rounded.
"""

from collections.abc import Callable

import torch
from lowmem_db_kernels.rounding import (
    pack_extra_bits_eager,
    round_stochastically_eager,
    rounding_key_eager,
    unpack_extra_bits_eager,
)
from torch import Tensor, nn

from lowmem_db.config.schema import Weights
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.randomness import derive_seed


def keep_weights_as(kind: Weights, optimizer: OptimizerHandle, *, seed: int) -> None:
    """Make an optimizer keep the fp32 weights it steps as another kind; ``fp32`` changes nothing."""
    if kind != "fp32":
        optimizer.step = _Stepping(kind, optimizer, seed)  # type: ignore[method-assign]


class _Stepping:
    """The optimizer's step, with the weights unpacked before it and packed after it."""

    def __init__(self, kind: Weights, optimizer: OptimizerHandle, seed: int) -> None:
        self.step: Callable[[], float] = optimizer.step
        self.parameters: list[nn.Parameter] = optimizer.parameters()
        self.kind = kind
        self.seeds = [derive_seed(seed, f"rounding of {index}") for index in range(len(self.parameters))]
        self.num_steps = 0
        self.stored = [parameter.data for parameter in self.parameters]
        if kind == "bf16_extra_bits":
            self._pack()
        else:
            for parameter in self.parameters:
                parameter.data = parameter.data.bfloat16().float()

    @torch.no_grad()
    def __call__(self) -> float:
        """Step once; return the norm of the gradients."""
        for parameter, stored in zip(self.parameters, self.stored, strict=True):
            assert parameter.grad is not None
            parameter.grad = parameter.grad.bfloat16().float()
            if self.kind == "bf16_extra_bits":
                parameter.data = stored
        norm = self.step()
        self.num_steps += 1
        if self.kind == "bf16_extra_bits":
            self._pack()
        else:
            self._round()
        return norm

    def _pack(self) -> None:
        for index, parameter in enumerate(self.parameters):
            high, low = pack_extra_bits_eager(parameter.data)
            self.stored[index] = unpack_extra_bits_eager(high, low)
            parameter.data = high.float()

    def _round(self) -> None:
        step = torch.tensor(self.num_steps)
        for parameter, seed in zip(self.parameters, self.seeds, strict=True):
            parameter.data = _rounded(parameter.data, rounding_key_eager(seed, step))


def _rounded(weight: Tensor, key: Tensor) -> Tensor:
    return round_stochastically_eager(weight.flatten(), key).float().view_as(weight)
