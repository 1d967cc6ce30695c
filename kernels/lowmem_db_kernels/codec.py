# ruff: noqa: ANN001, ANN201, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""The dynamic 8-bit map of bitsandbytes as arithmetic, without a table or a search.

A code has a sign, a decade and a linear fraction. With a magnitude d in 1 ... 2^7 (signed map) or 2 ... 2^8 (unsigned
map), j = floor(log2 d), L = 2^j and f = d - L, the value is

    10^(j - top) * (0.1 + 0.9 (f + 1/2) / L) = 5^j (18 d - 16 L + 9) * unit,

with the map's top and unit; the highest code is 1, the lowest magnitude 0. Encoding inverts this: the decade by
comparison with the midpoints between decades, the fraction by a floor.

Reference: Dettmers et al. 2022, arXiv:2110.02861, section 2 (dynamic tree quantization, blocks).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tl

BLOCK_SIZE = 256


class _Map(NamedTuple):
    """Constants of one map: its unit, the magnitude of 0 and of 1, and the bits of a decade beyond the signed map's."""

    unit: float
    top: int
    extra_bit: int


_SIGNED = _Map(5e-8, 128, 0)
_UNSIGNED = _Map(5e-9, 256, 1)


def _decade_thresholds(extra_bit: int) -> list[float]:
    """Return the six midpoints between the last value of a decade and the first of the next one."""
    return [10.0 ** (i - 6) * (1.0 + 0.9 / 2 ** (i + extra_bit)) for i in range(6)]


def _zero_threshold(extra_bit: int) -> float:
    """Return the midpoint between 0 and the smallest value."""
    return 1e-6 * (0.1 + 0.45 / 2**extra_bit) / 2


def _one_threshold(extra_bit: int) -> float:
    """Return the midpoint between the last value of the last decade and 1."""
    return 1.0 - 0.225 / 2 ** (6 + extra_bit)


S0, S1, S2, S3, S4, S5 = (tl.constexpr(value) for value in _decade_thresholds(0))
U0, U1, U2, U3, U4, U5 = (tl.constexpr(value) for value in _decade_thresholds(1))
SIGNED_ZERO = tl.constexpr(_zero_threshold(0))
UNSIGNED_ZERO = tl.constexpr(_zero_threshold(1))
SIGNED_ONE = tl.constexpr(_one_threshold(0))
UNSIGNED_ONE = tl.constexpr(_one_threshold(1))
NINTH = tl.constexpr(1.0 / 9.0)
BELOW_TWO = tl.constexpr(2.0 - 2.0**-23)

# --- plain PyTorch ---


def dynamic_map(signed: bool) -> Tensor:
    """Build the table that bitsandbytes stores with its states.

    Args:
        signed: Whether it is the map of first moments; otherwise that of second moments.

    Returns:
        256 fp32 values, ascending.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        boundaries = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        centres = (boundaries[:-1] + boundaries[1:]) / 2.0
        values += (10 ** (decade - 6) * centres).tolist()
        if signed:
            values += (-(10 ** (decade - 6)) * centres).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@lru_cache
def _decoded(signed: bool, device: torch.device) -> Tensor:
    """Return the value of every code by the arithmetic of `decode`: on a CPU a look-up is faster."""
    unit, top, _ = _SIGNED if signed else _UNSIGNED
    code = torch.arange(256)
    magnitude = (code - 127).abs() if signed else code + 1
    exponent = torch.frexp(magnitude.to(torch.float32)).exponent - 1
    level = 2.0 ** exponent.clamp(min=0)
    scale = 5.0 ** exponent.clamp(0, 7) * unit
    value = (18.0 * magnitude - 16.0 * level + 9.0) * scale
    value = torch.where(magnitude == top, 1.0, torch.where(magnitude <= (0 if signed else 1), 0.0, value))
    return (torch.where(code < 127, -value, value) if signed else value).to(device)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return `table[index]`, much faster on a CPU than by indexing."""
    return table.index_select(0, index.flatten()).view(index.shape)


def decode_eager(codes: Tensor, *, signed: bool) -> Tensor:
    """Decode 8-bit codes.

    Args:
        codes: uint8, any shape.
        signed: Whether it is the map of first moments; otherwise that of second moments.

    Returns:
        fp32 in [-1, 1], to be multiplied by the block's absolute maximum.
    """
    return _look_up(_decoded(signed, codes.device), codes.to(torch.int32))


def encode_eager(values: Tensor, *, signed: bool) -> Tensor:
    """Encode to the nearest code.

    Args:
        values: fp32 in [-1, 1], already divided by the block's absolute maximum.
        signed: Whether it is the map of first moments; otherwise that of second moments.

    Returns:
        uint8, of the same shape.
    """
    extra_bit = (_SIGNED if signed else _UNSIGNED).extra_bit
    size = values.abs()
    thresholds = torch.tensor(_decade_thresholds(extra_bit), dtype=torch.float32, device=values.device)
    decade = torch.bucketize(size, thresholds, right=True, out_int32=True)
    level = _look_up(2.0 ** torch.arange(extra_bit, 7 + extra_bit, device=values.device), decade)
    power = _look_up(10.0 ** torch.arange(7, 0, -1, device=values.device), decade)
    magnitude = (level * (size * power + 8.0) * (1.0 / 9.0)).floor()
    magnitude = torch.minimum(torch.maximum(magnitude, level), 2.0 * level - 1.0)
    zero, one = (0.0, 128.0) if signed else (1.0, 256.0)
    magnitude = torch.where(size < _zero_threshold(extra_bit), zero, magnitude)
    at_top = values >= _one_threshold(extra_bit)
    magnitude = torch.where(at_top, one, magnitude)
    codes = torch.where(values < 0, 127.0 - magnitude, 127.0 + magnitude) if signed else magnitude - 1.0
    return codes.to(torch.uint8)


# --- device functions: the same numbers with fewer instructions ---


@jit
def decode(codes, SIGNED: tl.constexpr):
    """Decode 8-bit codes, like `decode_eager`."""
    # 0x4B000000 is 2^23, whose last bit is worth one: the code becomes a float without a conversion.
    shifted = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    position = shifted - (8388608.0 + 127.0 if SIGNED else 8388608.0 - 1.0)
    magnitude = tl.abs(position)
    bits = magnitude.to(tl.int32, bitcast=True)
    level = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    # The exponent's low three bits after the bias of 127 = 128 - 1.
    decade = bits + 0x00800000
    power = tl.where((decade & 0x00800000) != 0, 5.0, 1.0) * tl.where((decade & 0x01000000) != 0, 25.0, 1.0)
    power = power * tl.where((decade & 0x02000000) != 0, 625.0, 1.0)
    # Of whole numbers below 2^24, so exact.
    fraction = tl.fma(magnitude, 18.0, tl.fma(level, -16.0, 9.0))
    value = fraction * (power * (5e-8 if SIGNED else 5e-9))
    if SIGNED:
        # By its formula the value of 1 is 1.035.
        value = tl.where(magnitude == 0.0, 0.0, tl.minimum(value, 1.0))
        sign = position.to(tl.int32, bitcast=True) & -0x80000000
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        value = tl.where(magnitude == 256.0, 1.0, tl.where(magnitude == 1.0, 0.0, value))
    return value


@jit
def _decade(size, T0, T1, T2, T3, T4, T5, T6):
    """Return the three bits of the number of thresholds that do not exceed `size`, by a search of three comparisons."""
    four = size >= T3
    two = size >= tl.where(four, T5, T1)
    one = size >= tl.where(two, tl.where(four, T6, T2), tl.where(four, T4, T0))
    return four, two, one


@jit
def encode(values, SIGNED: tl.constexpr):
    """Encode to the nearest code, like `encode_eager`.

    With d = 1 ... 7 the decade, 0 that of zero, and y = (10^(8-d) size + 8) / 9 in [1, 2), the magnitude is the whole
    part of 2^(d-1) y (2^d y in the unsigned map): y's leading bits, and for zero 0 (1) whatever y is.
    """
    size = tl.abs(values)
    if SIGNED:
        four, two, one = _decade(size, SIGNED_ZERO, S0, S1, S2, S3, S4, S5)
    else:
        four, two, one = _decade(size, UNSIGNED_ZERO, U0, U1, U2, U3, U4, U5)
    power = tl.where(four, 1e1, 1e5) * tl.where(two, 1.0, 1e2) * tl.where(one, 1.0, 1e1)
    # 154 / 512 is just below log10(2), so of 10^n this is n + 38, exactly.
    shift = tl.umulhi(power.to(tl.uint32, bitcast=True), 154).to(tl.int32) - (22 if SIGNED else 23)
    y = tl.minimum(tl.maximum((size * power + 8.0) * NINTH, 1.0), BELOW_TWO)
    magnitude = (y.to(tl.int32, bitcast=True) - 0x3F000000) >> shift
    if SIGNED:
        magnitude = tl.where(values >= SIGNED_ONE, 128, magnitude)
        # All ones where the value is negative: the complement plus one.
        sign = values.to(tl.int32, bitcast=True) >> 31
        code = (magnitude ^ sign) - sign + 127
    else:
        code = tl.where(values >= UNSIGNED_ONE, 255, magnitude - 1)
    return code.to(tl.uint8)
