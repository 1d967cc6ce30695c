"""From one type to another, tensor by tensor."""

import torch
from torch import Tensor

from lowmem_db.errors import ModelError


def stored_dtype(dtype: torch.dtype, precision: torch.dtype | None) -> torch.dtype:
    """Return the type that a tensor is written in: whole numbers stay, no precision leaves everything as it is."""
    return precision if precision is not None and dtype.is_floating_point else dtype


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor.

    Raises:
        ModelError: A finite weight has become infinite.
    """
    converted = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and bool((converted.isinf() & tensor.isfinite()).any()):
        raise ModelError(f"--precision: {name} holds values that fp16 cannot; allowed: bf16, fp32")
    return converted
