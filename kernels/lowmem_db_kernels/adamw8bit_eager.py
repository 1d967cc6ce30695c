"""`adamw8bit_step` in plain PyTorch: the reference for its kernels, and the fallback without them."""

from typing import Any

import torch
from torch import Tensor

from ._triton import cdiv
from .adamw8bit_state import StepOperands, scale_of_squares
from .codec import BLOCK_SIZE, decode_eager, encode_eager
from .rounding import pack_extra_bits_eager, round_stochastically_eager, rounding_key_eager, unpack_extra_bits_eager

_TINY = torch.finfo(torch.float32).tiny
# Elements at a time, in whole quantization blocks. On a CPU, temporaries of 1 MiB stay in the cache; a device needs few
# launches, and its temporaries count against its budget. No result depends on it.
CPU_CHUNK = 2**18
DEVICE_CHUNK = 2**20
_TEMPORARY_BYTES = 80  # per element of a chunk, of 24-bit weights with both scales and a last block to be filled up
_OPERATORS_OF_CHUNK, _MOVED_BYTES = 119, 860  # of 24-bit weights: launches, and what they move per element
_OPERATORS_OF_DRY_CHUNK, _MOVED_BYTES_DRY = 28, 208
_OTHER_OPERATORS = 34  # once for a parameter


def launches_and_bytes(num_elements: int, *, dry_run: bool) -> tuple[int, int]:
    """Return about how many operators a step on a device launches, and how many bytes they move.

    Args:
        num_elements: Elements of the parameter.
        dry_run: As in `adamw8bit_step`.
    """
    of_chunk, of_element = (
        (_OPERATORS_OF_DRY_CHUNK, _MOVED_BYTES_DRY) if dry_run else (_OPERATORS_OF_CHUNK, _MOVED_BYTES)
    )
    return _OTHER_OPERATORS + of_chunk * cdiv(num_elements, DEVICE_CHUNK), of_element * num_elements


def temporary_bytes(num_elements: int) -> int:
    """Return the most bytes of temporaries that a step on a device needs at its peak.

    Args:
        num_elements: Elements of the parameter.
    """
    partial_sums = 2 * 4 * cdiv(num_elements, BLOCK_SIZE)
    return _TEMPORARY_BYTES * min(num_elements, DEVICE_CHUNK) + partial_sums


def adamw8bit_step_eager(operands: StepOperands) -> Tensor:
    """Twin of `adamw8bit_step_triton` in plain PyTorch."""
    if operands.update_squares is not None:
        scale = scale_of_squares(operands.update_squares, operands.param.numel())
        operands = operands._replace(update_scale=scale, update_squares=None)
    param, size = operands.param, operands.param.numel()
    seed = (operands.seed_low & 0xFFFFFFFF) | (operands.seed_high & 0xFFFFFFFF) << 32
    key = rounding_key_eager(seed, operands.step)
    # One partial sum per quantization block, so that the chunk size does not change the order of a sum.
    partial_sums = param.new_empty((2, cdiv(size, BLOCK_SIZE)), dtype=torch.float32)
    chunk_size = CPU_CHUNK if param.device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, size, chunk_size):
        stop = min(start + chunk_size, size)
        blocks = slice(start // BLOCK_SIZE, cdiv(stop, BLOCK_SIZE))
        partial_sums[:, blocks] = _step_chunk(_chunk_of(operands, slice(start, stop), blocks), key, start)
    return partial_sums.sum(1)


def _chunk_of(operands: StepOperands, elements: slice, blocks: slice) -> StepOperands:
    """Return the operands with flat views of a range of blocks."""
    per_element = {name: getattr(operands, name) for name in ("param", "extra_bits", "grad", "state1", "state2")}
    pieces: dict[str, Any] = {
        name: _flat(tensor)[elements] for name, tensor in per_element.items() if tensor is not None
    }  # fmt: skip
    if operands.absmax1 is not None and operands.absmax2 is not None:
        pieces |= {"absmax1": operands.absmax1[blocks], "absmax2": operands.absmax2[blocks]}
    return operands._replace(**pieces)


def _step_chunk(chunk: StepOperands, key: Tensor, start: int) -> Tensor:
    """Update flat views of whole blocks and return the sums of each block, `(2, blocks)`."""
    raw, beta1, beta2 = chunk.grad.to(torch.float32), chunk.beta1, chunk.beta2
    m_old = _load_moment(chunk.state1, chunk.absmax1, signed=True)
    v_old = _load_moment(chunk.state2, chunk.absmax2, signed=False)
    g = raw if chunk.grad_scale is None else raw * chunk.grad_scale
    m = beta1 * m_old + (1.0 - beta1) * g
    v = beta2 * v_old + (1.0 - beta2) * (g * g)
    c1, root_c2 = chunk.corrections
    # g^2 is not finite where g is not.
    usable = v.isfinite()
    m, v = torch.where(usable, m, m_old), torch.where(usable, v, v_old)
    update = torch.where(usable, m * (root_c2 / c1) / (_root(v) + chunk.eps * root_c2), 0.0)
    sums = torch.stack([_blocks(raw.square()).sum(1), _blocks(update.square()).sum(1)])
    if chunk.dry_run:
        return sums
    param, extra_bits = chunk.param, chunk.extra_bits
    weight = param.to(torch.float32) if extra_bits is None else unpack_extra_bits_eager(param, extra_bits)
    scaled = update if chunk.update_scale is None else update * chunk.update_scale
    moved = torch.where(usable, weight - chunk.lr * (scaled + chunk.weight_decay * weight), weight)
    _store_weight(moved, param, extra_bits, key, start)
    has_usable = _blocks(usable).any(1)
    _store_moment(m, chunk.state1, chunk.absmax1, has_usable, signed=True)
    _store_moment(v, chunk.state2, chunk.absmax2, has_usable, signed=False)
    return sums


def _flat(tensor: Tensor) -> Tensor:
    """Return a flat view of a dense tensor, in storage order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _blocks(flat: Tensor) -> Tensor:
    """Split into rows of 256, the last one padded with zeros."""
    rest = -flat.numel() % BLOCK_SIZE
    return (torch.nn.functional.pad(flat, (0, rest)) if rest else flat).view(-1, BLOCK_SIZE)


def _root(x: Tensor) -> Tensor:
    """Return the correctly rounded square root, via float64: torch's fp32 root is not exact on every CPU."""
    return x.to(torch.float64).sqrt_().to(torch.float32) if x.device.type == "cpu" else x.sqrt()


def _load_moment(state: Tensor, absmax: Tensor | None, *, signed: bool) -> Tensor:
    if absmax is None:
        return state
    rows = _blocks(decode_eager(state, signed=signed)) * absmax[:, None]
    return rows.flatten()[: state.numel()]


def _store_moment(moment: Tensor, state: Tensor, absmax: Tensor | None, has_usable: Tensor, *, signed: bool) -> None:
    """Write a moment; a block without changed elements keeps its codes, which re-encoding could alter."""
    if absmax is None:
        state.copy_(moment)
        return
    rows = _blocks(moment)
    absmax.copy_(torch.where(has_usable, rows.abs().amax(1), absmax))
    inverse = 1.0 / absmax.clamp(min=_TINY)
    codes = torch.where(has_usable[:, None], encode_eager(rows * inverse[:, None], signed=signed), _blocks(state))
    state.copy_(codes.flatten()[: state.numel()])


def _store_weight(weight: Tensor, param: Tensor, extra_bits: Tensor | None, key: Tensor, start: int) -> None:
    if extra_bits is not None:
        high, low = pack_extra_bits_eager(weight)
        param.copy_(high)
        extra_bits.copy_(low)
    elif param.dtype == torch.bfloat16:
        param.copy_(round_stochastically_eager(weight, key, start))
    else:
        param.copy_(weight)
