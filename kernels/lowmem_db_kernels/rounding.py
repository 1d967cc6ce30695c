# ruff: noqa: ANN001, ANN201 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""bf16 weights that do not lose small updates: stochastic rounding, or eight extra bits.

All arithmetic is on integers, so that the interpreter, all cards and the eager twin agree bit for bit, and cards
without bf16 arithmetic work too.
"""

import torch
from torch import Tensor

from ._triton import jit, tl
from .philox import split_seed

_WORD = 0xFFFFFFFF
_QUIET_NAN = 0x7FC00000

# --- plain PyTorch; int64 holds the unsigned words ---


def mix_eager(words: Tensor) -> Tensor:
    """Hash 32-bit words with a bijection that has almost no bias.

    Reference: C. Wellons, "Prospecting for hash functions" (lowbias32).

    Args:
        words: int64 in [0, 2^32).

    Returns:
        int64 in [0, 2^32).
    """
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & _WORD
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & _WORD
    return words ^ (words >> 16)


def rounding_key_eager(seed: int, step: Tensor) -> Tensor:
    """Return the 32-bit key of one step's stochastic rounding.

    Args:
        seed: 64 bits, different for each parameter.
        step: Integer scalar.

    Returns:
        int64 scalar.
    """
    low, high = split_seed(seed)
    return mix_eager(low ^ mix_eager(high ^ mix_eager(step.to(torch.int64) & _WORD)))


def _bits(x: Tensor) -> Tensor:
    bits = x.view(torch.int32).to(torch.int64) & _WORD
    return torch.where(x.isnan(), _QUIET_NAN, bits)


def _as_bf16(words: Tensor) -> Tensor:
    """Reinterpret the low 16 bits of int64 words."""
    return words.to(torch.int16).view(torch.bfloat16)


def round_stochastically_eager(x: Tensor, key: Tensor, start: int = 0) -> Tensor:
    """Round fp32 to one of the two neighbouring bf16 values, with probabilities that make the mean exact.

    Args:
        x: fp32, flat; an element's position is the counter of its noise.
        key: From `rounding_key_eager`.
        start: Position of the first element.

    Returns:
        bf16.
    """
    index = torch.arange(start, start + x.numel(), device=x.device)
    noise = mix_eager((index & _WORD) ^ key) & 0xFFFF
    bits = _bits(x)
    # Infinity has no neighbour to round to.
    return _as_bf16(torch.where(x.isfinite(), bits + noise, bits) >> 16)


def pack_extra_bits_eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into the nearest bf16 and the next eight bits: a 24-bit float.

    It is rounded to 24 bits first, so a tie between two bf16 values may go to either.

    Args:
        x: fp32.

    Returns:
        bf16 and int8.
    """
    rounded = ((_bits(x) >> 7) + 1) >> 1
    high = (rounded + 128) >> 8
    return _as_bf16(high), (rounded - (high << 8)).to(torch.int8)


def unpack_extra_bits_eager(weight: Tensor, extra_bits: Tensor) -> Tensor:
    """Join a bf16 and its eight extra bits.

    Args:
        weight: bf16.
        extra_bits: int8.

    Returns:
        fp32 whose last eight bits are 0.
    """
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + (extra_bits.to(torch.int32) << 8)).view(torch.float32)


# --- device functions ---


@jit
def mix(words):
    """Hash uint32 words, as `mix_eager`."""
    words = words ^ (words >> 16)
    words = words * 0x7FEB352D
    words = words ^ (words >> 15)
    words = words * 0x846CA68B
    return words ^ (words >> 16)


@jit
def rounding_key(seed_low, seed_high, step):
    """Return the key of one step's rounding, as `rounding_key_eager`."""
    low = seed_low.to(tl.uint32, bitcast=True)
    high = seed_high.to(tl.uint32, bitcast=True)
    return mix(low ^ mix(high ^ mix(step.to(tl.uint32))))


@jit
def round_stochastically(x, index, key):
    """Round fp32 to bf16 with a counter-based dither, as `round_stochastically_eager`."""
    bits = x.to(tl.uint32, bitcast=True)
    noise = mix(index.to(tl.uint32) ^ key) & 0xFFFF
    dithered = tl.where(tl.abs(x) < float("inf"), bits + noise, bits)
    dithered = tl.where(x == x, dithered, 0x7FC00000)
    return (dithered >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit
def pack_extra_bits(x):
    """Split fp32 into bf16 and int8, as `pack_extra_bits_eager`."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(x == x, bits, 0x7FC00000)
    rounded = ((bits >> 7) + 1) >> 1
    high = (rounded + 128) >> 8
    low = rounded - (high << 8)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low.to(tl.int8)


@jit
def unpack_extra_bits(weight, extra_bits):
    """Join bf16 and int8 to fp32, as `unpack_extra_bits_eager`."""
    high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (high + (extra_bits.to(tl.int32) << 8)).to(tl.float32, bitcast=True)
