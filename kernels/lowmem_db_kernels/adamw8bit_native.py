"""The compiled form of `adamw8bit_step` for a CPU: every bit but those of the sums is that of the eager twin."""

import ctypes

import torch
from torch import Tensor

from .native import load
from .rounding import rounding_key_eager

_FORMATS = ("fp32", "stochastic", "extra_bits")


class _Arguments(ctypes.Structure):
    """Arguments of the C++ file, laid out alike."""

    _fields_ = (
        ("num_elements", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("param", "extra_bits", "grad", "state1", "state2", "absmax1", "absmax2")
        ),
        *((name, ctypes.c_float) for name in ("lr", "c1", "root_c2", "grad_scale", "update_scale")),
        *((name, ctypes.c_float) for name in ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2")),
        *((name, ctypes.c_float) for name in ("eps", "weight_decay")),
        ("key", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("weights", "grad_is_bf16", "dry_run")),
    )


def adamw8bit_step_native(
    param: Tensor,
    extra_bits: Tensor | None,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor | None,
    absmax2: Tensor | None,
    lr: Tensor,
    step: Tensor,
    corrections: Tensor,
    grad_scale: Tensor | None,
    update_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed_low: int,
    seed_high: int,
    dry_run: bool,
) -> Tensor:
    """Compiled twin of `adamw8bit_step_eager` for fp32 and bf16 gradients; arguments as there.

    Raises:
        NativeUnavailableError: It cannot be compiled here.
    """
    weights = "fp32" if param.dtype == torch.float32 else "stochastic" if extra_bits is None else "extra_bits"
    key = 0
    if weights == "stochastic":
        key = int(rounding_key_eager((seed_low & 0xFFFFFFFF) | (seed_high & 0xFFFFFFFF) << 32, step))
    c1, root_c2 = corrections.tolist()
    sums = torch.empty(2, dtype=torch.float32)
    arguments = _Arguments(
        param.numel(),
        *(None if tensor is None else tensor.data_ptr() for tensor in (param, extra_bits, grad, state1, state2)),
        *(None if tensor is None else tensor.data_ptr() for tensor in (absmax1, absmax2)),
        float(lr), c1, root_c2, *(1.0 if scale is None else float(scale) for scale in (grad_scale, update_scale)),
        beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, weight_decay,
        key, _FORMATS.index(weights), grad.dtype == torch.bfloat16, dry_run,
    )  # fmt: skip
    step_in_place = load("adamw8bit_native.cpp").adamw8bit_step
    step_in_place(ctypes.byref(arguments), torch.get_num_threads(), ctypes.c_void_p(sums.data_ptr()))
    return sums
