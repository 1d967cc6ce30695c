"""Convolutions in channels_last: the layout that tensor cores compute in, so that nothing is transposed around them.

Only the order of the weights in memory changes, not their shapes, names or values. What the convolutions return is then
in channels_last too, and so is what the fused GroupNorm+SiLU (:mod:`lowmem_db.memory.fused_layers`) makes of it.
Without fused layers torch's GroupNorm goes back to the other layout on CUDA devices, and little is gained. A
transformer with linear projections (Stable Diffusion 2.x and XL) returns the other layout too: one copy for each.

Losses and gradients differ in the last bits, because the libraries choose other kernels. The optimizer keeps its states
in the order of the weights in memory, so that the layout belongs to a run and cannot change when it is resumed.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

_NUM_DIMENSIONS = 4


def apply(module: nn.Module) -> Callable[[], None]:
    """Put the weights of a model's convolutions in channels_last; return the function that undoes it."""
    weights = [each for each in module.parameters() if each.ndim == _NUM_DIMENSIONS and each.is_contiguous()]
    _lay_out(weights, torch.channels_last)
    return partial(_lay_out, weights, torch.contiguous_format)


def _lay_out(weights: Iterable[nn.Parameter], memory_format: torch.memory_format) -> None:
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=memory_format)
