"""One AdamW step in one pass over parameter, gradient and two 8-bit states.

The states are those of bitsandbytes (`codec`): blocks of 256 with an fp32 absolute maximum, fp32 states below 4096
elements. All arithmetic is fp32. With g the scaled gradient, c1 and c2 the bias corrections and u the update,

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  u = (m / c1) / (sqrt(v / c2) + eps),
    p = p - lr (update_scale u + weight_decay p),

so that a small decay is not rounded away by itself; u is computed as in bitsandbytes,
m (sqrt(c2) / c1) / (sqrt(v) + eps sqrt(c2)), with one division per element. An element with an infinite or NaN gradient
keeps its weight and states, and the sum of squares shows it. Elements are processed in storage order, whatever the
memory format.

References: Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2; Dettmers et al. 2022, arXiv:2110.02861.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._triton import cdiv
from .adamw8bit_eager import adamw8bit_step_eager
from .adamw8bit_native import adamw8bit_step_native
from .adamw8bit_state import AdamW8bitState, StepOperands, bias_corrections, init_state
from .adamw8bit_triton import adamw8bit_step_triton
from .codec import BLOCK_SIZE
from .dispatch import choose, register
from .operators import custom_op, runs_plainly
from .philox import as_int32, split_seed
from .rounding import unpack_extra_bits_eager

_SERVERS = {
    "triton": adamw8bit_step_triton,
    "interpret": adamw8bit_step_triton,
    "native": adamw8bit_step_native,
    "eager": adamw8bit_step_eager,
}


def adamw8bit_step(
    param: Tensor,
    grad: Tensor,
    state: AdamW8bitState,
    *,
    lr: Tensor | float,
    step: Tensor | int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    extra_bits: Tensor | None = None,
    rounding_seed: int | None = None,
    corrections: Tensor | None = None,
    grad_scale: Tensor | None = None,
    update_scale: Tensor | None = None,
    update_squares: Tensor | None = None,
    dry_run: bool = False,
) -> Tensor:
    """Take one AdamW step in place, without synchronization.

    Args:
        param: fp32, or bf16 with either `extra_bits` or `rounding_seed`.
        grad: Gradient of the same shape and strides, any floating type.
        state: From `init_state`; written in place.
        lr: Learning rate: an fp32 scalar on the device, or a number.
        step: Number of this step, from 1: an int64 scalar on the device, or a number.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        extra_bits: int8 of the parameter's shape and strides; the weight is a 24-bit float (`rounding`).
        rounding_seed: 64-bit seed of stochastic rounding, different for each parameter.
        corrections: From `bias_corrections`, computed here if not given; compute it once for all parameters of a step.
        grad_scale: fp32 scalar on the device, factor for the gradient (clipping by `global` or `lagged` norm).
        update_scale: fp32 scalar on the device, factor for the update.
        update_squares: fp32 scalar on the device, the sum of squares of the update from a dry run: the update is scaled
            down to a root mean square of 1 (clipping by `update_rms`). Either this or `update_scale`.
        dry_run: Write nothing and only return the sums.

    Returns:
        fp32 `(2,)`: the sum of squares of the unscaled gradient, infinite or NaN if the gradient is, and that of the
        update before `update_scale`.

    Raises:
        ValueError: The tensors do not match, or the weights would lose small updates.
    """
    _check(param, grad, extra_bits, rounding_seed)
    if update_scale is not None and update_squares is not None:
        raise ValueError("pass either update_scale or update_squares: one is computed from the other")
    _check_state(param, state)
    device = param.device
    # A float64 scalar would make a kernel compute in float64.
    lr = lr.to(torch.float32) if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float32, device=device)
    grad_scale, update_scale, update_squares = (
        None if scale is None else scale.to(torch.float32) for scale in (grad_scale, update_scale, update_squares)
    )
    step = step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)
    corrections = bias_corrections(step, betas) if corrections is None else corrections
    seed_low, seed_high = split_seed(rounding_seed or 0)
    operands = StepOperands(
        param, extra_bits, grad, *state, lr, step, corrections, grad_scale, update_scale, *betas, eps, weight_decay,
        as_int32(seed_low), as_int32(seed_high), dry_run, update_squares,
    )  # fmt: skip
    if not runs_plainly(param):
        return _step_op(*operands)
    sums = _serve(operands)
    increment_version([tensor for tensor in (param, extra_bits, *state) if tensor is not None])
    return sums


def _check(param: Tensor, grad: Tensor, extra_bits: Tensor | None, rounding_seed: int | None) -> None:
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{param.dtype} weights are not supported; keep them in fp32 or bf16")
    helpers = (extra_bits is not None) + (rounding_seed is not None)
    if param.dtype == torch.bfloat16 and helpers != 1:
        raise ValueError("bf16 weights lose small updates by rounding; pass either extra_bits or rounding_seed")
    if param.dtype == torch.float32 and helpers:
        raise ValueError("extra_bits and rounding_seed are for bf16 weights, but these are fp32")
    if not _is_dense(param):
        raise ValueError(f"a parameter with strides {param.stride()} is not dense")
    for name, tensor in (("grad", grad), ("extra_bits", extra_bits)):
        if tensor is not None and (tensor.shape != param.shape or not _same_order(tensor, param)):
            raise ValueError(f"{name} must have the shape and strides of the parameter")


def _check_state(param: Tensor, state: AdamW8bitState) -> None:
    quantized = state.absmax1 is not None
    if quantized != (state.absmax2 is not None):
        raise ValueError("a state must have both absmax1 and absmax2, or neither")
    num_blocks = cdiv(param.numel(), BLOCK_SIZE)
    moment = torch.uint8 if quantized else torch.float32
    expected = (moment, moment, torch.float32, torch.float32), (param.numel(),) * 2 + (num_blocks,) * 2
    for name, tensor, dtype, size in zip(AdamW8bitState._fields, state, *expected, strict=True):
        if tensor is not None and (tensor.dtype != dtype or tensor.numel() != size or not _is_dense(tensor)):
            raise ValueError(
                f"{name} is {tensor.dtype} with {tensor.numel()} elements, strides {tensor.stride()}; this parameter"
                f" needs {size} dense elements of {dtype}"
            )


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():  # nearly always; an empty tensor too
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_order(first: Tensor, second: Tensor) -> bool:
    """Return whether tensors of one shape have the same element order; strides of dimensions of size 1 do not count."""
    pairs = zip(first.stride(), second.stride(), first.shape, strict=True)
    return all(a == b for a, b, size in pairs if size != 1)


def _server(param: Tensor, grad: Tensor) -> Callable[..., Tensor]:
    backend = choose("adamw8bit_step", param.device, param.dtype).backend
    if backend == "native":
        backend = choose("adamw8bit_step", param.device, grad.dtype).backend
    return _SERVERS[backend]


def _serve(operands: StepOperands) -> Tensor:
    return _server(operands.param, operands.grad)(operands)


_WRITTEN = ("param", "extra_bits", *AdamW8bitState._fields)
_step_op = custom_op("adamw8bit_step", _serve, StepOperands, Tensor, mutates=_WRITTEN)


@_step_op.register_fake
def _(param: Tensor, *arguments: object) -> Tensor:
    return param.new_empty((2,), dtype=torch.float32)


def _results(serve: Callable[..., Tensor], weight_format: str, device: torch.device) -> dict[str, Tensor]:
    """Take one step of a small problem and return its results, by name."""
    weight = torch.linspace(-1, 1, 5000, device=device)
    grad = torch.linspace(-1e-3, 2e-3, 5000, device=device)
    extra_bits = None
    if weight_format != "fp32":
        weight = weight.to(torch.bfloat16)
    if weight_format == "extra_bits":
        extra_bits = torch.zeros_like(weight, dtype=torch.int8)
    lr, step = torch.full((), 1e-3, device=device), torch.ones((), dtype=torch.int64, device=device)
    state = init_state(weight)
    operands = StepOperands(
        weight, extra_bits, grad, *state, lr, step, bias_corrections(step, (0.9, 0.999)), None, None, 0.9, 0.999, 1e-8,
        0.01, 1, 2, False,
    )  # fmt: skip
    sums = serve(operands)
    if extra_bits is not None:
        weight = unpack_extra_bits_eager(weight, extra_bits)
    return {"sums": sums, "weight": weight, **{name: x for name, x in state._asdict().items() if x is not None}}


def _self_test(device: torch.device) -> None:
    got = _results(adamw8bit_step_triton, "extra_bits", device)
    expected = _results(adamw8bit_step_eager, "extra_bits", device)
    for name in expected:
        # A code may fall on the other side of a tie.
        rtol, atol = (0.0, 1.0) if expected[name].dtype == torch.uint8 else (1e-4, 1e-7)
        _assert_close(name, got[name], expected[name], rtol, atol)


def _native_self_test(device: torch.device) -> None:
    for weight_format in ("fp32", "stochastic", "extra_bits"):
        got, expected = (
            _results(serve, weight_format, device) for serve in (adamw8bit_step_native, adamw8bit_step_eager)
        )
        for name in expected:
            rtol = 1e-5 if name == "sums" else 0.0
            _assert_close(f"{name} with {weight_format} weights", got[name], expected[name], rtol, 0.0)


def _assert_close(name: str, got: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    message = lambda text: f"{name}: {text}"  # noqa: E731
    torch.testing.assert_close(got.float(), expected.float(), rtol=rtol, atol=atol, msg=message)


register("adamw8bit_step", _self_test, native_self_test=_native_self_test)
