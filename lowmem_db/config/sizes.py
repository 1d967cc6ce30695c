"""Sizes in bytes, in the notations that people use."""

import re

_UNITS = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(size: object) -> int:
    """Return the bytes of ``8GiB`` (2^30 each), ``8GB`` (10^9 each), or of a number of bytes.

    Raises:
        ValueError: It is not a size.
    """
    match = _SIZE.fullmatch(str(size)) if isinstance(size, str | int | float) and not isinstance(size, bool) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("is not a size; allowed: 8GiB, 7.5GB and the like, or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])
