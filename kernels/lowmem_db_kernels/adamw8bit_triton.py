# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""The Triton kernel of `adamw8bit_step`: one pass over parameter, gradient and states."""

import torch
from torch import Tensor

from ._triton import cdiv, jit, load_fp32, or_dummy, tl
from .adamw8bit_state import StepOperands
from .codec import BLOCK_SIZE, decode, encode
from .launch import device_of, launch_config
from .rounding import pack_extra_bits, round_stochastically, rounding_key, unpack_extra_bits

FP32 = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
EXTRA_BITS = tl.constexpr(2)
QUANTIZATION_BLOCK = tl.constexpr(BLOCK_SIZE)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@jit
def _inverse_maximum(absmax):
    """Return the inverse of a block's maximum; finite even if that is 0."""
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
    num_rows,
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
    HAS_UPDATE_SQUARES: tl.constexpr,
    DRY_RUN: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update chunks of whole quantization blocks, one row each; `partial` is `(2, rows)`, grid `(programs,)`.

    The pointer to the scale of the update points to its sum of squares where there is one.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if REVERSE:
        program = num_programs - 1 - program
    ROWS: tl.constexpr = BLOCK // QUANTIZATION_BLOCK
    step = tl.load(step_ptr)
    lr = tl.load(lr_ptr)
    root_c2 = tl.load(corrections_ptr + 1)
    moment_scale = tl.div_rn(root_c2, tl.load(corrections_ptr))
    scaled_eps = eps * root_c2
    update_scale = 1.0
    if HAS_UPDATE_SQUARES:
        mean_square = tl.div_rn(tl.load(update_scale_ptr), num_elements * 1.0)
        update_scale = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(mean_square), 1.0))  # rounded as torch does it
    elif HAS_UPDATE_SCALE:
        update_scale = tl.load(update_scale_ptr)
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
        # g^2 is not finite where g is not.
        usable = v < float("inf")
        m = tl.where(usable, m, m_old)
        v = tl.where(usable, v, v_old)
        update = tl.where(usable & inside, m * moment_scale / (tl.sqrt(v) + scaled_eps), 0.0)
        tl.store(partial_ptr + rows, tl.sum(raw * raw, axis=1), mask=has_row)
        tl.store(partial_ptr + num_rows + rows, tl.sum(update * update, axis=1), mask=has_row)
        if not DRY_RUN:
            weight = _load_weight(param_ptr, extra_ptr, elements, inside, WEIGHTS)
            if HAS_UPDATE_SQUARES or HAS_UPDATE_SCALE:
                update = update * update_scale
            moved = tl.where(usable, weight - lr * (update + weight_decay * weight), weight)
            _store_weight(param_ptr, extra_ptr, moved, elements, inside, key, WEIGHTS)
            # A block without changed elements keeps its codes, which re-encoding could alter.
            changed = tl.max((usable & inside).to(tl.int32), axis=1) != 0
            inside = inside & changed[:, None]
            _store_moment(state1_ptr, absmax1_ptr, m, elements, inside, rows, changed, True, QUANTIZED)
            _store_moment(state2_ptr, absmax2_ptr, v, elements, inside, rows, changed, False, QUANTIZED)


def adamw8bit_step_triton(operands: StepOperands) -> Tensor:
    """Launch the kernel; arguments and result are those of the operator."""
    param, extra_bits, absmax1, lr = operands.param.detach(), operands.extra_bits, operands.absmax1, operands.lr
    grad_scale, update_scale, squares = operands.grad_scale, operands.update_scale, operands.update_squares
    beta1, beta2 = operands.beta1, operands.beta2
    config = launch_config("adamw8bit_step", param)
    num_chunks = cdiv(param.numel(), config.block)
    num_rows = cdiv(param.numel(), BLOCK_SIZE)
    partial = param.new_empty((2, num_rows), dtype=torch.float32)
    weights = 0 if param.dtype == torch.float32 else 1 if extra_bits is None else 2
    if num_chunks:
        with device_of(param):
            _step_kernel[(config.grid(num_chunks),)](
                param, or_dummy(extra_bits, param), operands.grad, operands.state1, operands.state2,
                or_dummy(absmax1, lr), or_dummy(operands.absmax2, lr), partial, lr, operands.step,
                operands.corrections, or_dummy(grad_scale, lr), or_dummy(update_scale if squares is None else squares,
                lr), param.numel(), num_rows, num_chunks, beta1, 1.0 - beta1, beta2, 1.0 - beta2, operands.eps,
                operands.weight_decay, operands.seed_low, operands.seed_high, WEIGHTS=weights,
                QUANTIZED=absmax1 is not None, HAS_GRAD_SCALE=grad_scale is not None,
                HAS_UPDATE_SCALE=update_scale is not None, HAS_UPDATE_SQUARES=squares is not None,
                DRY_RUN=operands.dry_run, REVERSE=config.reverse, BLOCK=config.block, **config.options,
            )  # fmt: skip
    return partial.sum(1)
