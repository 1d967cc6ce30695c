from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_db.data.order import sample_indices

LENGTHS = st.integers(1, 40)


@given(seed=st.integers(0, 2**31), length=LENGTHS, epochs=st.integers(1, 4))
def test_every_item_comes_once_per_epoch(seed, length, epochs):
    indices = sample_indices(seed, "instance", 0, length * epochs, length)
    for epoch in range(epochs):
        assert sorted(indices[epoch * length : (epoch + 1) * length]) == list(range(length))


@given(length=LENGTHS, start=st.integers(0, 500), count=st.integers(0, 100))
def test_a_part_of_the_sequence_is_the_same_wherever_it_starts(length, start, count):
    whole = sample_indices(7, "instance", 0, start + count, length)
    assert sample_indices(7, "instance", start, count, length) == whole[start:]


def test_epochs_seeds_and_streams_differ():
    first = sample_indices(0, "instance", 0, 200, 100)
    assert first[:100] != first[100:]
    assert first != sample_indices(1, "instance", 0, 200, 100)
    assert first != sample_indices(0, "prior", 0, 200, 100)


def test_the_first_item_is_any_item():
    firsts = Counter(sample_indices(seed, "instance", 0, 1, 4)[0] for seed in range(400))
    assert len(firsts) == 4
    assert all(60 < count < 140 for count in firsts.values())


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match="length is 0"):
        sample_indices(0, "instance", 0, 1, 0)
