"""The compiled form of `adamw8bit_step` for CPUs: all results except the sums equal the eager twin's bit for bit."""

import ctypes

import torch
from torch import Tensor

from .adamw8bit_state import StepOperands, scale_of_squares
from .native import load
from .rounding import rounding_key_eager

_FORMATS = ("fp32", "stochastic", "extra_bits")


class _Arguments(ctypes.Structure):
    """Arguments of the C++ function, in the same layout."""

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


def adamw8bit_step_native(operands: StepOperands) -> Tensor:
    """Compiled twin of `adamw8bit_step_eager` for fp32 and bf16 gradients.

    Raises:
        NativeUnavailableError: It cannot be compiled on this machine.
    """
    param, grad = operands.param, operands.grad
    stochastic = "stochastic" if operands.extra_bits is None else "extra_bits"
    weights = "fp32" if param.dtype == torch.float32 else stochastic
    key = 0
    if weights == "stochastic":
        seed = (operands.seed_low & 0xFFFFFFFF) | (operands.seed_high & 0xFFFFFFFF) << 32
        key = int(rounding_key_eager(seed, operands.step))
    c1, root_c2 = operands.corrections.tolist()
    beta1, beta2 = operands.beta1, operands.beta2
    tensors = (param, operands.extra_bits, grad, *operands.state)
    squares, update_scale = operands.update_squares, operands.update_scale
    if squares is not None:
        update_scale = scale_of_squares(squares, param.numel())
    scales = (operands.grad_scale, update_scale)
    sums = torch.empty(2, dtype=torch.float32)
    arguments = _Arguments(
        param.numel(), *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        float(operands.lr), c1, root_c2, *(1.0 if scale is None else float(scale) for scale in scales),
        beta1, 1.0 - beta1, beta2, 1.0 - beta2, operands.eps, operands.weight_decay,
        key, _FORMATS.index(weights), grad.dtype == torch.bfloat16, operands.dry_run,
    )  # fmt: skip
    step_in_place = load("adamw8bit_native.cpp").adamw8bit_step
    step_in_place(ctypes.byref(arguments), torch.get_num_threads(), ctypes.c_void_p(sums.data_ptr()))
    return sums
