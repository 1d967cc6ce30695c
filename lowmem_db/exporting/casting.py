"""Converting tensors from one type to another."""

import torch
from torch import Tensor

from lowmem_db.errors import ModelError, NonFiniteError
from lowmem_db.finite import is_finite


def stored_dtype(dtype: torch.dtype, precision: torch.dtype | None) -> torch.dtype:
    """Return the type to write a tensor in: integers stay as they are; without a precision everything does."""
    return precision if precision is not None and dtype.is_floating_point else dtype


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor.

    Raises:
        ModelError: A finite weight would become infinite.
        NonFiniteError: It is infinite or NaN already.
    """
    if not is_finite(tensor):
        raise NonFiniteError(
            f"{name}: has values that are infinite or NaN, so nothing is written; export an earlier checkpoint, or "
            "train again with a lower learning rate"
        )
    converted = tensor.to(dtype)
    if not is_finite(converted):
        raise ModelError(f"--precision: {name} has values that are too large for fp16; allowed: bf16, fp32")
    return converted
