"""Square crops of photos, as tensors. A crop depends on the picture and its number alone, so every run can share it."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lowmem_db.data.photos import read_photo
from lowmem_db.errors import DataError
from lowmem_db.randomness import generator
from lowmem_db.records import ImageRecord

Crop = Literal["random", "center"]


def num_distinct_crops(record: ImageRecord, *, resolution: int, crop: Crop, num_crops: int) -> int:
    """Return how many crops of a picture are worth encoding.

    Args:
        record: The picture.
        resolution: Pixels of a side of the crop.
        crop: Where the square is cut.
        num_crops: How many random crops are wanted.

    Returns:
        1 for centre crops and square pictures; never more than there are positions that differ by a whole pixel.
    """
    if crop == "center":
        return 1
    shorter, longer = sorted((record.width, record.height))
    return min(num_crops, 1 + (longer - shorter) * resolution // shorter)


def load_pixels(record: ImageRecord, *, resolution: int, crop: Crop, index: int) -> Float[Tensor, "3 h w"]:
    """Read one square crop of a picture, the shorter side resized to ``resolution``.

    The filter is Lanczos, its support scaled to the reduction. Photos are usually reduced several times: a filter
    without antialiasing gives moire there and a bilinear or box filter gives blur, and the model learns either.

    Args:
        record: The picture.
        resolution: Pixels of a side of the crop.
        crop: Where the square is cut.
        index: Number of the random crop; without effect on centre crops and square pictures.

    Returns:
        Values in [-1, 1], float32.

    Raises:
        DataError: The file can no longer be read, or has another size than the record says.
    """
    image = read_photo(record.path)
    if image.size != (record.width, record.height):
        raise DataError(
            f"{record.path}: is {image.width} x {image.height} pixels, it was {record.width} x {record.height} when "
            "its folder was read; leave the photos alone while a run prepares, and start it again"
        )
    box = _square(record, crop, index)
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def _square(record: ImageRecord, crop: Crop, index: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the crop, in pixels of the picture."""
    side = min(record.width, record.height)
    place = 0.5 if crop == "center" else _place(record.content_key, index)
    left, top = place * (record.width - side), place * (record.height - side)
    return left, top, left + side, top + side


def _place(content_key: str, index: int) -> float:
    """Draw where a crop lies on its way along the longer side, uniform in [0, 1)."""
    return torch.rand((), dtype=torch.float64, generator=generator(0, f"crop:{content_key}", index)).item()
