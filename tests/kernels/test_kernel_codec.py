import pytest
import torch
from lowmem_db_kernels.codec import decode_eager, dynamic_map, encode_eager

CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_decoding_agrees_with_the_map(signed):
    torch.testing.assert_close(decode_eager(CODES, signed=signed), dynamic_map(signed), rtol=3e-7, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_survives_a_round_trip(signed):
    assert torch.equal(encode_eager(decode_eager(CODES, signed=signed), signed=signed), CODES)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("spread", ["uniform", "logarithmic"])
def test_encoding_finds_the_nearest_code_but_for_ties(signed, spread):
    values = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    values = 10 ** (-8 * values) if spread == "logarithmic" else values
    values = torch.where(torch.arange(len(values)) % 2 == 0, values, -values) if signed else values
    table = dynamic_map(signed).double()
    nearest = torch.bucketize(values.double(), (table[1:] + table[:-1]) / 2)
    difference = (encode_eager(values, signed=signed).long() - nearest).abs()
    assert difference.max() <= 1
    assert (difference != 0).sum() <= 20  # of a million
