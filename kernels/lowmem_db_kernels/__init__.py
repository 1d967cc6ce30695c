"""Fused kernels for a low-memory diffusion trainer: Triton where it is available, plain PyTorch everywhere.

Every operator has an eager twin with the same signature. `status` says which implementation each one uses and why; the
environment variable `LOWMEM_DB_KERNELS` (`auto`, `triton`, `native`, `eager`, `interpret`) selects another.
"""

from .adamw8bit_state import (
    MINIMUM_8BIT_SIZE,
    AdamW8bitState,
    bias_corrections,
    from_bitsandbytes,
    init_state,
    to_bitsandbytes,
)
from .adamw8bit_step import adamw8bit_step
from .diffusion_loss import DiffusionLoss, diffusion_loss
from .dispatch import (
    Choice,
    KernelUnavailableError,
    Operator,
    OperatorStatus,
    registry,
    requested_mode,
    self_test,
    status,
    will_compile,
)
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .noise import NoiseCoefficients, noise
from .philox import Stream, standard_normal_eager
from .rounding import pack_extra_bits_eager, unpack_extra_bits_eager

__all__ = [
    "MINIMUM_8BIT_SIZE",
    "AdamW8bitState",
    "Choice",
    "DiffusionLoss",
    "KernelUnavailableError",
    "NoiseCoefficients",
    "Operator",
    "OperatorStatus",
    "Stream",
    "adamw8bit_step",
    "bias_corrections",
    "diffusion_loss",
    "from_bitsandbytes",
    "geglu",
    "group_norm_silu",
    "init_state",
    "noise",
    "pack_extra_bits_eager",
    "registry",
    "requested_mode",
    "self_test",
    "standard_normal_eager",
    "status",
    "to_bitsandbytes",
    "unpack_extra_bits_eager",
    "will_compile",
]
