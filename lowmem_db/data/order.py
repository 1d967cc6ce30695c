"""The order of samples: endless shuffled epochs, as a pure function of the position."""

from functools import lru_cache

from lowmem_db import randomness


def sample_indices(seed: int, stream: str, start: int, count: int, length: int) -> list[int]:
    """Return the items at consecutive positions of an endless sequence of shuffled epochs.

    Args:
        seed: The run's seed.
        stream: What is shuffled; streams are independent of each other.
        start: First position.
        count: Number of positions.
        length: Number of items; each occurs once per epoch.

    Raises:
        ValueError: There are no items.
    """
    if length < 1:
        raise ValueError(f"length is {length}; allowed: 1 or more")
    places = (divmod(position, length) for position in range(start, start + count))
    return [_epoch(seed, stream, epoch, length)[place] for epoch, place in places]


@lru_cache(maxsize=16)
def _epoch(seed: int, stream: str, epoch: int, length: int) -> tuple[int, ...]:
    return tuple(randomness.permutation(seed, stream, epoch, length))
