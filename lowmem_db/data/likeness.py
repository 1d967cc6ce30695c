"""How sharp a photo is, and which photos are nearly the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

BLURRED = 20.0
"""Sharpness below which a photo looks blurred: focus missed by 2 to 4 of 512 pixels."""
_SIDE = 512  # sharpness is measured at this length of the shorter side, so that photos can be compared
_TILES = 8
_HASH_SIDE = 16
_MAX_DIFFERENCE = 0.1  # of the bits of a hash

Hash = tuple[bool, ...]


def sharpness(image: Image.Image) -> float:
    """Return how sharp the sharpest parts of a photo are.

    It is the 90th percentile, over 64 tiles, of the variance of the Laplacian (Pech-Pacheco et al. 2000) of the grey
    values from 0 to 255, so that a blurred background does not matter.

    Args:
        image: The photo; it is resized so that its shorter side has 512 pixels.
    """
    scale = _SIDE / min(image.size)
    size = (max(_SIDE, round(image.width * scale)), max(_SIDE, round(image.height * scale)))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0), dtype=np.float32)
    edges = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    tiles = [tile for rows in np.array_split(edges, _TILES) for tile in np.array_split(rows, _TILES, axis=1)]
    return float(np.percentile([tile.var() for tile in tiles], 90))


def difference_hash(image: Image.Image) -> Hash:
    """Return whether each of 256 parts of a photo is brighter than the part to its left.

    It hardly changes when a photo is resized, compressed or slightly edited.
    """
    grey = image.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX, reducing_gap=3.0)
    values = np.asarray(grey, dtype=np.int16)
    return tuple((values[:, 1:] > values[:, :-1]).ravel().tolist())


def near_duplicates(hashes: Mapping[Path, Hash]) -> list[tuple[Path, ...]]:
    """Return the groups of photos whose hashes differ in at most a tenth of their bits."""
    groups: list[list[Path]] = []
    for path, own in hashes.items():
        group = next((group for group in groups if any(_is_near(own, hashes[other]) for other in group)), None)
        if group is None:
            groups.append([path])
        else:
            group.append(path)
    return [tuple(group) for group in groups if len(group) > 1]


def _is_near(a: Sequence[bool], b: Sequence[bool]) -> bool:
    return sum(x != y for x, y in zip(a, b, strict=True)) <= _MAX_DIFFERENCE * len(a)
