"""Bit-exact contracts: the 8-bit codec, stochastic rounding, the 24-bit weight, rounding to bf16."""

import pytest
import torch
from kernel_contract import assert_bit_equal, guarded
from lowmem_db_kernels._triton import jit, round_to_bf16, tl
from lowmem_db_kernels.codec import decode, decode_eager, encode, encode_eager
from lowmem_db_kernels.philox import as_int32, split_seed
from lowmem_db_kernels.rounding import (
    pack_extra_bits,
    pack_extra_bits_eager,
    round_stochastically,
    round_stochastically_eager,
    rounding_key,
    rounding_key_eager,
    unpack_extra_bits,
    unpack_extra_bits_eager,
)

BLOCK = 4096


@jit
def decode_kernel(codes_ptr, values_ptr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(values_ptr + index, decode(tl.load(codes_ptr + index), SIGNED))


@jit
def encode_kernel(values_ptr, codes_ptr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(codes_ptr + index, encode(tl.load(values_ptr + index), SIGNED))


@jit
def rounding_kernel(x_ptr, nearest_ptr, stochastic_ptr, step_ptr, seed_low, seed_high, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    tl.store(nearest_ptr + index, round_to_bf16(x))
    key = rounding_key(seed_low, seed_high, tl.load(step_ptr))
    tl.store(stochastic_ptr + index, round_stochastically(x, index, key))


@jit
def extra_bits_kernel(x_ptr, high_ptr, low_ptr, back_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    high, low = pack_extra_bits(tl.load(x_ptr + index))
    tl.store(high_ptr + index, high)
    tl.store(low_ptr + index, low)
    tl.store(back_ptr + index, unpack_extra_bits(high, low))


@pytest.fixture
def floats(device):
    """All kinds of numbers: random bit patterns, and the awkward ones."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (BLOCK,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).clone()
    nan_with_all_bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    x[:3] = nan_with_all_bits
    x[3:10] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -3.4e38, 3.4e38])
    return x.to(device)


@pytest.mark.parametrize("signed", [True, False])
def test_decode(device, signed):
    codes = torch.arange(BLOCK, device=device).to(torch.uint8)
    with guarded() as guard:
        values = guard(torch.empty(BLOCK, device=device))
        decode_kernel[(1,)](codes, values, SIGNED=signed, BLOCK=BLOCK, enable_fp_fusion=False)
    assert_bit_equal("values", values, decode_eager(codes, signed=signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("spread", ["uniform", "logarithmic", "codes"])
def test_encode(device, signed, spread):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(BLOCK, generator=generator)
    if spread == "logarithmic":
        values = 10 ** (-8 * values)
    if spread == "codes":
        values = decode_eager(torch.arange(BLOCK).to(torch.uint8), signed=signed)
    elif signed:
        values *= torch.randn(BLOCK, generator=generator).sign()
    values[:2] = torch.tensor([1.0, 0.0])
    values = values.to(device)
    with guarded() as guard:
        codes = guard(torch.empty(BLOCK, dtype=torch.uint8, device=device))
        encode_kernel[(1,)](values, codes, SIGNED=signed, BLOCK=BLOCK, enable_fp_fusion=False)
    assert_bit_equal("codes", codes, encode_eager(values, signed=signed))


def test_rounding(device, floats):
    step = torch.tensor(123456789012, device=device)
    seed = 2**63 + 12345
    with guarded() as guard:
        nearest, stochastic = (guard(torch.empty(BLOCK, dtype=torch.bfloat16, device=device)) for _ in range(2))
        words = (as_int32(word) for word in split_seed(seed))
        rounding_kernel[(1,)](floats, nearest, stochastic, step, *words, BLOCK=BLOCK)
    number = ~floats.isnan()
    assert_bit_equal("nearest", nearest[number], floats.to(torch.bfloat16)[number])
    assert nearest[~number].isnan().all()
    expected = round_stochastically_eager(floats, rounding_key_eager(seed, step))
    assert_bit_equal("stochastic", stochastic, expected)
    assert stochastic[~number].isnan().all()


def test_extra_bits(device, floats):
    with guarded() as guard:
        high = guard(torch.empty(BLOCK, dtype=torch.bfloat16, device=device))
        low = guard(torch.empty(BLOCK, dtype=torch.int8, device=device))
        back = guard(torch.empty(BLOCK, device=device))
        extra_bits_kernel[(1,)](floats, high, low, back, BLOCK=BLOCK)
    expected = pack_extra_bits_eager(floats)
    assert_bit_equal("high", high, expected[0])
    assert_bit_equal("low", low, expected[1])
    assert_bit_equal("back", back, unpack_extra_bits_eager(*expected))
    assert back[floats.isnan()].isnan().all()
