"""Finding infinite values and NaN in tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

_NARROW = 1  # byte; torch cannot compare 8-bit floating-point numbers


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; without a copy of the tensor, and one synchronization on a device."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    values = tensor.detach().float() if tensor.dtype.itemsize == _NARROW else tensor.detach()
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a value that is not finite, or None."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)
