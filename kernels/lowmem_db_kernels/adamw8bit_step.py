# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""One AdamW step in one pass over parameter, gradient and two 8-bit states.

The states are those of bitsandbytes (`codec`): blocks of 256 with an fp32 absolute maximum, fp32 states below 4096
elements. All arithmetic is fp32. With g the scaled gradient, c1 and c2 the bias corrections and u the update,

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  u = (m / c1) / (sqrt(v / c2) + eps),
    p = p - lr (update_scale u + weight_decay p),

so that the decay of a small learning rate is not rounded away on its own. An element whose gradient is not finite keeps
its weight and states; the sum of squares tells. Elements are taken in storage order, whatever the memory format.

References: Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2; Dettmers et al. 2022, arXiv:2110.02861.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from ._triton import cdiv, jit, load_fp32, or_dummy, tl
from .codec import BLOCK_SIZE, decode, decode_eager, dynamic_map, encode, encode_eager
from .dispatch import register, uses_kernel
from .launch import device_of, launch_config
from .philox import as_int32, split_seed
from .rounding import (
    pack_extra_bits,
    pack_extra_bits_eager,
    round_stochastically,
    round_stochastically_eager,
    rounding_key,
    rounding_key_eager,
    unpack_extra_bits,
    unpack_extra_bits_eager,
)

MINIMUM_8BIT_SIZE = 4096
_TINY = torch.finfo(torch.float32).tiny

FP32 = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
EXTRA_BITS = tl.constexpr(2)
QUANTIZATION_BLOCK = tl.constexpr(BLOCK_SIZE)
TINY = tl.constexpr(_TINY)


class AdamW8bitState(NamedTuple):
    """The state of one parameter, in storage order.

    Attributes:
        state1: First moments: uint8 codes, or fp32 for a small parameter; strides of the parameter.
        state2: Second moments, alike.
        absmax1: fp32 absolute maximum of each block of 256 first moments; None for a small parameter.
        absmax2: The same of the second moments.
    """

    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None


def init_state(param: Tensor) -> AdamW8bitState:
    """Make the state of a parameter before its first step.

    Args:
        param: The parameter.

    Returns:
        Zero moments, with 8 bits per moment from 4096 elements on.
    """
    if param.numel() < MINIMUM_8BIT_SIZE:
        zeros = torch.zeros_like(param, dtype=torch.float32)
        return AdamW8bitState(zeros, zeros.clone(), None, None)
    absmax = torch.zeros(cdiv(param.numel(), BLOCK_SIZE), dtype=torch.float32, device=param.device)
    # Code 127 is the signed zero; bitsandbytes starts from code 0, whose block maximum of 0 makes it the same.
    codes = torch.zeros_like(param, dtype=torch.uint8)
    return AdamW8bitState(codes, codes.clone(), absmax, absmax.clone())


def to_bitsandbytes(state: AdamW8bitState, step: int) -> dict[str, Tensor | int]:
    """Write a state as bitsandbytes keeps it in `optimizer.state[parameter]`.

    Args:
        state: The state of a contiguous parameter.
        step: Steps taken.

    Returns:
        The entries of an 8-bit blockwise state, or of a 32-bit state.
    """
    entries: dict[str, Tensor | int] = {"step": step, "state1": state.state1, "state2": state.state2}
    if state.absmax1 is not None and state.absmax2 is not None:
        device = state.state1.device
        entries |= {"qmap1": dynamic_map(signed=True).to(device), "absmax1": state.absmax1}
        entries |= {"qmap2": dynamic_map(signed=False).to(device), "absmax2": state.absmax2}
    return entries


def from_bitsandbytes(entries: dict) -> tuple[AdamW8bitState, int]:
    """Read a state that bitsandbytes wrote.

    Args:
        entries: `optimizer.state[parameter]` of AdamW8bit.

    Returns:
        The state, sharing the tensors, and the number of steps taken.

    Raises:
        ValueError: The state is in another 8-bit map.
    """
    for name, signed in (("qmap1", True), ("qmap2", False)):
        if name in entries and not torch.equal(entries[name].cpu(), dynamic_map(signed=signed)):
            raise ValueError(f"{name} is not the dynamic map; only AdamW8bit with block-wise states can be read")
    state = AdamW8bitState(entries["state1"], entries["state2"], entries.get("absmax1"), entries.get("absmax2"))
    return state, int(entries["step"])


def bias_corrections(step: Tensor, betas: tuple[float, float]) -> Tensor:
    """Compute the bias corrections of one step, in float64 and without reading the step back.

    Args:
        step: Number of the step, from 1: an integer scalar.
        betas: Decay rates of the moments.

    Returns:
        fp32 `(2,)`: `1 - beta1^step` and the square root of `1 - beta2^step`.
    """
    logarithms = torch.full((2,), math.log(betas[0]), dtype=torch.float64, device=step.device)
    logarithms[1] = math.log(betas[1])
    corrections = -torch.expm1(step * logarithms)
    corrections[1] = corrections[1].sqrt()
    return corrections.to(torch.float32)


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
    dry_run: bool = False,
) -> Tensor:
    """Take one AdamW step in place, reading nothing back to the host.

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
        corrections: From `bias_corrections`, made here if not given; make it once for all parameters of a step.
        grad_scale: fp32 scalar on the device that multiplies the gradient (clipping by `global` or `lagged` norm).
        update_scale: fp32 scalar on the device that multiplies the update (clipping by `update_rms`).
        dry_run: Write nothing and return the sums only, from which `update_rms` makes its scale.

    Returns:
        fp32 `(2,)`: the sum of squares of the unscaled gradient, not finite where that is not, and of the update
        before `update_scale`.

    Raises:
        ValueError: The tensors do not fit each other, or the weights could not keep small updates.
    """
    _check(param, grad, extra_bits, rounding_seed)
    device = param.device
    lr = lr if isinstance(lr, Tensor) else torch.full((), lr, device=device)
    step = step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)
    corrections = bias_corrections(step, betas) if corrections is None else corrections
    seed_low, seed_high = split_seed(rounding_seed or 0)
    return _step_op(
        param, extra_bits, grad, *state, lr, step, corrections, grad_scale, update_scale, *betas, eps, weight_decay,
        as_int32(seed_low), as_int32(seed_high), dry_run,
    )  # fmt: skip


def adamw8bit_step_flat(
    params: list[Tensor],
    grads: list[Tensor],
    state: AdamW8bitState,
    *,
    extra_bits: Tensor | None = None,
    lr: Tensor | float,
    step: Tensor | int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    rounding_seed: int | None = None,
    corrections: Tensor | None = None,
    grad_scale: Tensor | None = None,
    update_scale: Tensor | None = None,
) -> Tensor:
    """Step many small parameters of one type in one launch.

    Args:
        params: Parameters with fp32 states.
        grads: Their gradients.
        state: fp32 states of all of them, flat and in order.
        extra_bits: int8, flat and in order.
        lr: As in `adamw8bit_step`, and so are the rest.
        step: See there.
        betas: See there.
        eps: See there.
        weight_decay: See there.
        rounding_seed: See there.
        corrections: See there.
        grad_scale: See there.
        update_scale: See there.

    Returns:
        As `adamw8bit_step`, over all parameters.
    """
    param = torch.cat([tensor.detach().reshape(-1) for tensor in params])
    grad = torch.cat([tensor.reshape(-1) for tensor in grads])
    sums = adamw8bit_step(
        param, grad, state, lr=lr, step=step, betas=betas, eps=eps, weight_decay=weight_decay, extra_bits=extra_bits,
        rounding_seed=rounding_seed, corrections=corrections, grad_scale=grad_scale, update_scale=update_scale,
    )  # fmt: skip
    pieces = param.split([tensor.numel() for tensor in params])
    with torch.no_grad():
        torch._foreach_copy_(params, [piece.view_as(tensor) for piece, tensor in zip(pieces, params, strict=True)])
    return sums


def _check(param: Tensor, grad: Tensor, extra_bits: Tensor | None, rounding_seed: int | None) -> None:
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{param.dtype} weights cannot be stepped; keep them in fp32 or bf16")
    helpers = (extra_bits is not None) + (rounding_seed is not None)
    if param.dtype == torch.bfloat16 and helpers != 1:
        raise ValueError("bf16 weights round small updates away: give either extra_bits or rounding_seed")
    if param.dtype == torch.float32 and helpers:
        raise ValueError("extra_bits and rounding_seed belong to bf16 weights, and the weights are fp32")
    if not _is_dense(param):
        raise ValueError(f"a parameter of strides {param.stride()} is not dense")
    for name, tensor in (("grad", grad), ("extra_bits", extra_bits)):
        if tensor is not None and (tensor.shape != param.shape or not _same_order(tensor, param)):
            raise ValueError(f"{name} differs from the parameter in shape or strides; lay it out alike")


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_order(first: Tensor, second: Tensor) -> bool:
    """Say whether two tensors of one shape have their elements in the same order; strides of size 1 mean nothing."""
    pairs = zip(first.stride(), second.stride(), first.shape, strict=True)
    return all(a == b for a, b, size in pairs if size != 1)


@torch.library.custom_op(
    add_op_namespace_prefix("adamw8bit_step"),
    mutates_args=("param", "extra_bits", "state1", "state2", "absmax1", "absmax2"),
)
def _step_op(
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
    serve = adamw8bit_step_triton if uses_kernel("adamw8bit_step", param) else adamw8bit_step_eager
    return serve(
        param, extra_bits, grad, state1, state2, absmax1, absmax2, lr, step, corrections, grad_scale, update_scale,
        beta1, beta2, eps, weight_decay, seed_low, seed_high, dry_run,
    )  # fmt: skip


@_step_op.register_fake
def _(param: Tensor, *arguments: object) -> Tensor:
    return param.new_empty((2,), dtype=torch.float32)


# --- plain PyTorch ---


def _flat(tensor: Tensor) -> Tensor:
    """View a dense tensor in storage order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _blocks(flat: Tensor) -> Tensor:
    """Cut into rows of 256, padded with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)


def _decode_state(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    values = decode_eager(_blocks(codes), signed=signed) * absmax[:, None]
    return values.flatten()[: codes.numel()]


def _encode_state(values: Tensor, codes: Tensor, absmax: Tensor, *, signed: bool) -> None:
    rows = _blocks(values)
    absmax.copy_(rows.abs().amax(1))
    inverse = 1.0 / absmax.clamp(min=_TINY)
    codes.copy_(encode_eager(rows * inverse[:, None], signed=signed).flatten()[: codes.numel()])


def adamw8bit_step_eager(
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
    """Twin of `adamw8bit_step_triton` in plain PyTorch; arguments as there."""
    flat_param, codes1, codes2 = _flat(param), _flat(state1), _flat(state2)
    raw = _flat(grad).to(torch.float32)
    m_old = codes1 if absmax1 is None else _decode_state(codes1, absmax1, signed=True)
    v_old = codes2 if absmax2 is None else _decode_state(codes2, absmax2, signed=False)
    g = raw if grad_scale is None else raw * grad_scale
    m = beta1 * m_old + (1.0 - beta1) * g
    v = beta2 * v_old + (1.0 - beta2) * (g * g)
    c1, root_c2 = corrections
    usable = g.isfinite() & v.isfinite()
    m, v = torch.where(usable, m, m_old), torch.where(usable, v, v_old)
    update = torch.where(usable, (m / c1) / (v.sqrt() / root_c2 + eps), 0.0)
    sums = torch.stack([raw.square().sum(), update.square().sum()])
    if dry_run:
        return sums

    flat_extra = None if extra_bits is None else _flat(extra_bits)
    weight = flat_param.to(torch.float32) if flat_extra is None else unpack_extra_bits_eager(flat_param, flat_extra)
    scaled = update if update_scale is None else update * update_scale
    moved = torch.where(usable, weight - lr * (scaled + weight_decay * weight), weight)
    if flat_extra is not None:
        high, low = pack_extra_bits_eager(moved)
        flat_param.copy_(high)
        flat_extra.copy_(low)
    elif param.dtype == torch.bfloat16:
        seed = (seed_low & 0xFFFFFFFF) | (seed_high & 0xFFFFFFFF) << 32
        flat_param.copy_(round_stochastically_eager(moved, rounding_key_eager(seed, step)))
    else:
        flat_param.copy_(moved)
    if absmax1 is None or absmax2 is None:
        codes1.copy_(m)
        codes2.copy_(v)
    else:
        _encode_state(m, codes1, absmax1, signed=True)
        _encode_state(v, codes2, absmax2, signed=False)
    return sums


# --- Triton ---


@jit
def _inverse_maximum(absmax):
    """Return the inverse of a block's maximum, finite where that is 0."""
    return tl.div_rn(1.0, tl.maximum(absmax, TINY))


@jit
def _load_weight(param_ptr, extra_ptr, elements, inside, WEIGHTS: tl.constexpr):
    if WEIGHTS == EXTRA_BITS:
        high = tl.load(param_ptr + elements, mask=inside, other=0.0)
        weight = unpack_extra_bits(high, tl.load(extra_ptr + elements, mask=inside, other=0))
    else:
        weight = load_fp32(param_ptr + elements, inside)
    return weight


@jit
def _store_weight(param_ptr, extra_ptr, weight, elements, inside, key, WEIGHTS: tl.constexpr):
    if WEIGHTS == FP32:
        tl.store(param_ptr + elements, weight, mask=inside)
    elif WEIGHTS == STOCHASTIC:
        tl.store(param_ptr + elements, round_stochastically(weight, elements, key), mask=inside)
    else:
        high, low = pack_extra_bits(weight)
        tl.store(param_ptr + elements, high, mask=inside)
        tl.store(extra_ptr + elements, low, mask=inside)


@jit
def _load_moment(state_ptr, absmax_ptr, elements, inside, rows, has_row, SIGNED: tl.constexpr, QUANTIZED: tl.constexpr):
    if QUANTIZED:
        absmax = tl.load(absmax_ptr + rows, mask=has_row, other=0.0)
        moment = (
            decode(tl.load(state_ptr + elements, mask=inside, other=127 if SIGNED else 0), SIGNED) * absmax[:, None]
        )
    else:
        moment = tl.load(state_ptr + elements, mask=inside, other=0.0)
    return moment


@jit
def _store_moment(
    state_ptr, absmax_ptr, moment, elements, inside, rows, has_row, SIGNED: tl.constexpr, QUANTIZED: tl.constexpr
):
    if QUANTIZED:
        absmax = tl.max(tl.abs(moment), axis=1)
        tl.store(absmax_ptr + rows, absmax, mask=has_row)
        tl.store(state_ptr + elements, encode(moment * _inverse_maximum(absmax)[:, None], SIGNED), mask=inside)
    else:
        tl.store(state_ptr + elements, moment, mask=inside)


@jit
def _sum_tile(values):
    return tl.sum(tl.sum(values, axis=1), axis=0)


@jit(unspecialized=("seed_low", "seed_high"))
def _step_kernel(
    param_ptr,
    extra_ptr,
    grad_ptr,
    state1_ptr,
    state2_ptr,
    absmax1_ptr,
    absmax2_ptr,
    partial_ptr,
    lr_ptr,
    step_ptr,
    corrections_ptr,
    grad_scale_ptr,
    update_scale_ptr,
    num_elements,
    num_chunks,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    seed_low,
    seed_high,
    WEIGHTS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr,
    HAS_UPDATE_SCALE: tl.constexpr,
    DRY_RUN: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step chunks of whole quantization blocks, one row each; `partial` is `(2, chunks)`, grid `(programs,)`."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if REVERSE:
        program = num_programs - 1 - program
    ROWS: tl.constexpr = BLOCK // QUANTIZATION_BLOCK
    step = tl.load(step_ptr)
    lr = tl.load(lr_ptr)
    c1 = tl.load(corrections_ptr)
    root_c2 = tl.load(corrections_ptr + 1)
    key = rounding_key(seed_low, seed_high, step)
    row_in_chunk = tl.arange(0, ROWS)
    column = tl.arange(0, QUANTIZATION_BLOCK)
    for chunk in range(program, num_chunks, num_programs):
        rows = chunk * ROWS + row_in_chunk
        elements = rows[:, None] * QUANTIZATION_BLOCK + column[None, :]
        inside = elements < num_elements
        has_row = rows * QUANTIZATION_BLOCK < num_elements
        raw = load_fp32(grad_ptr + elements, inside)
        m_old = _load_moment(state1_ptr, absmax1_ptr, elements, inside, rows, has_row, True, QUANTIZED)
        v_old = _load_moment(state2_ptr, absmax2_ptr, elements, inside, rows, has_row, False, QUANTIZED)
        g = raw
        if HAS_GRAD_SCALE:
            g = raw * tl.load(grad_scale_ptr)
        m = beta1 * m_old + one_minus_beta1 * g
        v = beta2 * v_old + one_minus_beta2 * (g * g)
        usable = (tl.abs(g) < float("inf")) & (v < float("inf"))
        m = tl.where(usable, m, m_old)
        v = tl.where(usable, v, v_old)
        update = tl.where(usable, (m / c1) / (tl.sqrt(v) / root_c2 + eps), 0.0)
        tl.store(partial_ptr + chunk, _sum_tile(raw * raw))
        tl.store(partial_ptr + num_chunks + chunk, _sum_tile(tl.where(inside, update * update, 0.0)))
        if not DRY_RUN:
            weight = _load_weight(param_ptr, extra_ptr, elements, inside, WEIGHTS)
            if HAS_UPDATE_SCALE:
                update = update * tl.load(update_scale_ptr)
            moved = tl.where(usable, weight - lr * (update + weight_decay * weight), weight)
            _store_weight(param_ptr, extra_ptr, moved, elements, inside, key, WEIGHTS)
            _store_moment(state1_ptr, absmax1_ptr, m, elements, inside, rows, has_row, True, QUANTIZED)
            _store_moment(state2_ptr, absmax2_ptr, v, elements, inside, rows, has_row, False, QUANTIZED)


def adamw8bit_step_triton(
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
    """Launch the kernel.

    Args:
        param: As in `adamw8bit_step`.
        extra_bits: As in `adamw8bit_step`.
        grad: As in `adamw8bit_step`.
        state1: As in `AdamW8bitState`.
        state2: As in `AdamW8bitState`.
        absmax1: As in `AdamW8bitState`.
        absmax2: As in `AdamW8bitState`.
        lr: fp32 scalar.
        step: int64 scalar.
        corrections: From `bias_corrections`.
        grad_scale: As in `adamw8bit_step`.
        update_scale: As in `adamw8bit_step`.
        beta1: First of the betas.
        beta2: Second of the betas.
        eps: As in `adamw8bit_step`.
        weight_decay: As in `adamw8bit_step`.
        seed_low: Low word of the rounding seed, as a signed integer.
        seed_high: High word of the rounding seed, as a signed integer.
        dry_run: As in `adamw8bit_step`.

    Returns:
        As `adamw8bit_step`.
    """
    config = launch_config("adamw8bit_step", param)
    num_chunks = cdiv(param.numel(), config.block)
    partial = param.new_empty((2, num_chunks), dtype=torch.float32)
    weights = 0 if param.dtype == torch.float32 else 1 if extra_bits is None else 2
    if num_chunks:
        with device_of(param):
            _step_kernel[(config.grid(num_chunks),)](
                param.detach(), or_dummy(extra_bits, param.detach()), grad, state1, state2, or_dummy(absmax1, lr),
                or_dummy(absmax2, lr), partial, lr, step, corrections, or_dummy(grad_scale, lr),
                or_dummy(update_scale, lr), param.numel(), num_chunks, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps,
                weight_decay, seed_low, seed_high, WEIGHTS=weights, QUANTIZED=absmax1 is not None,
                HAS_GRAD_SCALE=grad_scale is not None, HAS_UPDATE_SCALE=update_scale is not None, DRY_RUN=dry_run,
                REVERSE=config.reverse, BLOCK=config.block, **config.options,
            )  # fmt: skip
    return partial.sum(1)


def _self_test(device: torch.device) -> None:
    param = torch.linspace(-1, 1, 5000, device=device).to(torch.bfloat16)
    grad = torch.linspace(-1e-3, 2e-3, 5000, device=device)
    lr = torch.full((), 1e-3, device=device)
    step = torch.ones((), dtype=torch.int64, device=device)
    corrections = bias_corrections(step, (0.9, 0.999))
    results = []
    for serve in (adamw8bit_step_triton, adamw8bit_step_eager):
        weight, extra_bits, state = param.clone(), torch.zeros_like(param, dtype=torch.int8), init_state(param)
        sums = serve(
            weight, extra_bits, grad, *state, lr, step, corrections, None, None, 0.9, 0.999, 1e-8, 0.01, 1, 2, False
        )
        results.append((sums, unpack_extra_bits_eager(weight, extra_bits), *state))
    for name, got, expected in zip(("sums", "weight", "m", "v", "absmax1", "absmax2"), *results, strict=True):
        # A code may fall to the other side of a tie.
        rtol, atol = (0.0, 1.0) if got.dtype == torch.uint8 else (1e-4, 1e-7)
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(got.float(), expected.float(), rtol=rtol, atol=atol, msg=message)


register("adamw8bit_step", _self_test)
