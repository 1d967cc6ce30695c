"""Fused kernels of a low-memory diffusion trainer: Triton where it serves, plain PyTorch everywhere.

Every operator has an eager twin of the same signature. `status` says what serves each and why; the environment variable
`LOWMEM_DB_KERNELS` (`auto`, `triton`, `eager`, `interpret`) decides otherwise.
"""

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
)
from .noise import NoiseTables, noise, noise_tables
from .philox import Stream

__all__ = [
    "Choice",
    "DiffusionLoss",
    "KernelUnavailableError",
    "NoiseTables",
    "Operator",
    "OperatorStatus",
    "Stream",
    "diffusion_loss",
    "noise",
    "noise_tables",
    "registry",
    "requested_mode",
    "self_test",
    "status",
]
