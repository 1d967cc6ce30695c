# ruff: noqa: ANN001, ANN201 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""Counter-based random numbers: Philox4x32-10 and standard normals, on the device and in plain PyTorch.

A number is a function of (seed, step, sample id, stream, element) only. The counter of element `e` of a sample is

    (e // 4, sample id mod 2^32, step, stream + 256 * (sample id // 2^32)),     the key is the 64-bit seed,

and the element is word `e % 4` of the four that one call returns, after the Box-Muller transform of the word pairs.

Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

from ._triton import jit, tl

_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
# Odd and even polynomials in the angle on [-pi/4, pi/4], fitted at Chebyshev nodes; error below 1e-7.
_SIN = (-0.16666665, 0.00833275, -0.00019588)
_COS = (4.16666864e-02, -1.38897158e-03, 2.47311441e-05)
_ANGLE = math.pi / 2 / 2**30
_UNIT = 2.0**-32
_HALF_UNIT = 2.0**-33

MULTIPLIER_0 = tl.constexpr(_MULTIPLIER_0)
MULTIPLIER_1 = tl.constexpr(_MULTIPLIER_1)
WEYL_0 = tl.constexpr(_WEYL_0)
WEYL_1 = tl.constexpr(_WEYL_1)
SIN_3 = tl.constexpr(_SIN[0])
SIN_5 = tl.constexpr(_SIN[1])
SIN_7 = tl.constexpr(_SIN[2])
COS_4 = tl.constexpr(_COS[0])
COS_6 = tl.constexpr(_COS[1])
COS_8 = tl.constexpr(_COS[2])
ANGLE = tl.constexpr(_ANGLE)
UNIT = tl.constexpr(_UNIT)
HALF_UNIT = tl.constexpr(_HALF_UNIT)


class Stream(IntEnum):
    """The purpose of a random number; different streams never share a counter."""

    NOISE = 0
    POSTERIOR = 1
    OFFSET = 2
    PERTURBATION = 3


def split_seed(seed: int) -> tuple[int, int]:
    """Split a 64-bit seed into its low and high word.

    Args:
        seed: Any integer; taken modulo 2^64.

    Returns:
        Two words in [0, 2^32).
    """
    return seed & _WORD, (seed >> 32) & _WORD


def as_int32(word: int) -> int:
    """Reinterpret an unsigned word as the signed integer with the same bits, so that a launch always gets an int32.

    Args:
        word: In [0, 2^32).

    Returns:
        In [-2^31, 2^31).
    """
    return word - (1 << 32) if word >> 31 else word


# --- plain PyTorch ---


def _multiply(multiplier: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low word of a 64-bit product; int64 wraps around, which keeps every bit."""
    product = words * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox_4x32_eager(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Apply Philox4x32-10.

    Args:
        counter: Four int64 tensors of words in [0, 2^32), of broadcastable shapes.
        seed: The key, 64 bits.

    Returns:
        Four int64 tensors of words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = split_seed(seed)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIER_0, c0)
        high1, low1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def _polar(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller: two words to two standard normals, fp32, sine and cosine after exact reduction to an eighth turn."""
    uniform = radius_word.to(torch.float32) * _UNIT + _HALF_UNIT
    radius = torch.sqrt(torch.log(uniform) * -2.0)
    quadrant = ((angle_word + (1 << 29)) >> 30) & 3
    angle = (((angle_word + (1 << 29)) & (2**30 - 1)) - (1 << 29)).to(torch.float32) * _ANGLE
    square = angle * angle
    sine = angle + angle * square * (_SIN[0] + square * (_SIN[1] + square * _SIN[2]))
    cosine = 1.0 - 0.5 * square + square * square * (_COS[0] + square * (_COS[1] + square * _COS[2]))
    odd = (quadrant & 1).bool()
    first = torch.where(odd, sine, cosine)
    second = torch.where(odd, cosine, sine)
    first = torch.where(((quadrant + 1) & 2).bool(), -first, first)
    second = torch.where((quadrant & 2).bool(), -second, second)
    return radius * first, radius * second


def standard_normal_eager(num_elements: int, sample_ids: Tensor, *, seed: int, step: int, stream: int) -> Tensor:
    """Draw standard normals.

    Args:
        num_elements: Elements per sample.
        sample_ids: int64, shape `(B,)`, in [0, 2^56).
        seed: 64-bit seed.
        step: Step, in [0, 2^32).
        stream: One of `Stream`.

    Returns:
        fp32 of shape `(B, num_elements)`.
    """
    quads = torch.arange((num_elements + 3) // 4, device=sample_ids.device)[None, :]
    ids = sample_ids[:, None]
    counter = (quads, ids & _WORD, torch.full_like(ids, step), (ids >> 32) * 256 + stream)
    words = philox_4x32_eager(counter, seed)
    normals = torch.stack((*_polar(words[0], words[1]), *_polar(words[2], words[3])), dim=-1)
    return normals.flatten(1)[:, :num_elements]


# --- device functions ---


@jit
def philox_4x32(c0, c1, c2, c3, k0, k1):
    """Apply Philox4x32-10 to uint32 counters under a uint32 key pair."""
    for _ in tl.static_range(10):
        low0 = c0 * MULTIPLIER_0
        high0 = tl.umulhi(c0, MULTIPLIER_0)
        low1 = c2 * MULTIPLIER_1
        high1 = tl.umulhi(c2, MULTIPLIER_1)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 += WEYL_0
        k1 += WEYL_1
    return c0, c1, c2, c3


@jit
def polar(radius_word, angle_word):
    """Device form of `_polar`, operation by operation."""
    uniform = radius_word.to(tl.float32) * UNIT + HALF_UNIT
    radius = tl.sqrt(tl.log(uniform) * -2.0)
    shifted = angle_word + (1 << 29)
    quadrant = shifted >> 30
    angle = ((shifted & 0x3FFFFFFF).to(tl.int32) - (1 << 29)).to(tl.float32) * ANGLE
    square = angle * angle
    sine = angle + angle * square * (SIN_3 + square * (SIN_5 + square * SIN_7))
    cosine = 1.0 - 0.5 * square + square * square * (COS_4 + square * (COS_6 + square * COS_8))
    odd = (quadrant & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    second = tl.where((quadrant & 2) != 0, -second, second)
    return radius * first, radius * second


@jit
def normal_block(first_quad, sample_id, step, seed_low, seed_high, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the `BLOCK` standard normals of one sample that start at element `4 * first_quad`."""
    quads = (first_quad + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    c1 = sample_id.to(tl.uint32)
    c3 = (sample_id >> 32).to(tl.uint32) * 256 + STREAM
    k0 = seed_low.to(tl.uint32, bitcast=True)
    k1 = seed_high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox_4x32(quads, c1, step.to(tl.uint32, bitcast=True), c3, k0, k1)
    n0, n1 = polar(w0, w1)
    n2, n3 = polar(w2, w3)
    # Joined this way, lane 2i + j of a quad is word 2i + j, and a thread's lanes are contiguous: stores of 128 bits.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))
