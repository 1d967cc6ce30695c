"""Sizes in bytes, in the notations that people use."""

import re

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": 1 << (10 * power) for power, letter in enumerate("kmgt", start=1) for ending in ("", "b", "ib")
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_MOST_GIB = 1024


def parse_bytes(size: object) -> int:
    """Return the bytes of a size: ``8``, ``8G``, ``8GB`` and ``8GiB`` are 8 * 2^30, as on the box of a card.

    A number from 1024 on is a number of bytes.

    Raises:
        ValueError: It is not a size.
    """
    match = _SIZE.fullmatch(str(size)) if isinstance(size, str | int | float) and not isinstance(size, bool) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("is not a size; allowed: 8, 8G, 8GiB, 512MiB and the like, or a number of bytes")
    number, unit = float(match[1]), match[2].lower()
    return int(number * _UNITS["g" if not unit and number < _MOST_GIB else unit])
