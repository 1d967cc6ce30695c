import pytest
import torch
from lowmem_db_kernels.philox import Stream, philox_4x32_eager, standard_normal_eager

# Known answers of the reference implementation, Random123 (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "seed", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, seed, expected):
    words = philox_4x32_eager(tuple(torch.tensor(word) for word in counter), seed)
    assert [int(word) for word in words] == expected


def draw(num_elements=65536, ids=(0,), seed=1, step=2, stream=Stream.NOISE):
    return standard_normal_eager(num_elements, torch.tensor(ids), seed=seed, step=step, stream=stream)


def test_distribution_is_standard_normal():
    sample = draw().flatten().double().sort().values
    n = len(sample)
    distance = (torch.special.ndtr(sample) - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
    assert distance < 1.63 / n**0.5  # Kolmogorov-Smirnov at 1 %
    assert abs((sample**4).mean() - 3) < 4 * (96 / n) ** 0.5


@pytest.mark.parametrize("other", [{"seed": 1 + 2**32}, {"step": 3}, {"ids": (2**32,)}, {"stream": Stream.POSTERIOR}])
def test_every_part_of_the_key_changes_the_numbers(other):
    first, second = draw(), draw(**other)
    assert abs((first * second).mean()) < 0.02
    assert not torch.equal(first, second)


def test_a_sample_does_not_depend_on_the_batch():
    assert torch.equal(draw(ids=(7, 9, 2**40))[2], draw(ids=(2**40,))[0])


def test_a_prefix_does_not_depend_on_the_length():
    assert torch.equal(draw(1023)[:, :63], draw(63))
