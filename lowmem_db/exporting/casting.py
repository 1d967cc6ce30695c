"""Converting tensors from one type to another."""

import torch
from torch import Tensor

from lowmem_db.errors import ModelError


def stored_dtype(dtype: torch.dtype, precision: torch.dtype | None) -> torch.dtype:
    """Return the type to write a tensor in: integers stay as they are; without a precision everything does."""
    return precision if precision is not None and dtype.is_floating_point else dtype


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor.

    Raises:
        ModelError: A finite weight would become infinite.
    """
    converted = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and bool((converted.isinf() & tensor.isfinite()).any()):
        raise ModelError(f"--precision: {name} has values that are too large for fp16; allowed: bf16, fp32")
    return converted
