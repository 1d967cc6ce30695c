"""Crops of photos, as tensors. A crop depends only on the image, its size and its number, so runs can share it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lowmem_db.data.photos import read_photo
from lowmem_db.errors import DataError
from lowmem_db.randomness import generator
from lowmem_db.records import ImageRecord, Size

Crop = Literal["random", "center"]


@dataclass(frozen=True)
class Box:
    """A rectangle in an image: left, top, width and height in pixels."""

    left: float
    top: float
    width: float
    height: float


def num_distinct_crops(record: ImageRecord, *, size: Size, crop: Crop, num_crops: int) -> int:
    """Return how many crops of an image are worth encoding.

    Args:
        record: The image.
        size: Height and width of the crop.
        crop: Where to crop.
        num_crops: How many random crops are wanted.

    Returns:
        1 for centre crops and images with the aspect ratio of the crop; at most the number of positions that differ by
        a whole pixel.
    """
    if crop == "center":
        return 1
    height, width = size
    too_wide = record.width * height - record.height * width  # compares aspect ratios
    free_pixels = too_wide // record.height if too_wide > 0 else -too_wide // record.width
    return min(num_crops, 1 + free_pixels)


def load_pixels(
    record: ImageRecord, *, size: Size, crop: Crop, index: int, mirrored: bool = False
) -> Float[Tensor, "3 h w"]:
    """Read one crop of an image, which is resized to just cover the crop.

    The filter is Lanczos with antialiasing. Photos are usually reduced several times: without antialiasing that gives
    moire, and a bilinear or box filter gives blur; the model would learn either.

    Args:
        record: The image.
        size: Height and width of the crop.
        crop: Where to crop.
        index: Number of the random crop; no effect on centre crops and images with the aspect ratio of the crop.
        mirrored: Exchange left and right.

    Returns:
        Values in [-1, 1], float32.

    Raises:
        DataError: The file can no longer be read, or its size has changed.
    """
    image = read_photo(record.path)
    if image.size != (record.width, record.height):
        raise DataError(
            f"{record.path}: is {image.width} x {image.height} pixels, but was {record.width} x {record.height} when "
            "its folder was read; start the run again, and do not change the photos meanwhile"
        )
    box = crop_box(record, size, crop, index)
    corners = (box.left, box.top, min(box.left + box.width, image.width), min(box.top + box.height, image.height))
    cut = image.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=corners)
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous().float() / 127.5 - 1
    return pixels.flip(-1) if mirrored else pixels


def crop_facts(
    record: ImageRecord, *, size: Size, crop: Crop, index: int, mirrored: bool = False
) -> Float[Tensor, " 6"]:
    """Return the sizes and position of a crop, on which SDXL is conditioned (arXiv:2307.01952, section 2.2).

    Returns:
        Height and width of the original image; top and left of the crop in the resized image, which is mirrored with
        it; height and width of the crop. All in pixels.
    """
    box = crop_box(record, size, crop, index)
    scale = size[0] / box.height
    from_left = record.width - box.left - box.width if mirrored else box.left
    top, left = round(box.top * scale), round(from_left * scale)
    return torch.tensor([record.height, record.width, top, left, *size], dtype=torch.float32)


def whole_picture_facts(size: Size, count: int) -> Float[Tensor, "b 6"]:
    """Return the facts of images that are neither resized nor cropped, such as generated ones."""
    return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(count, 1)


def crop_box(record: ImageRecord, size: Size, crop: Crop, index: int) -> Box:
    """Return the largest box with the aspect ratio of the crop, at its position."""
    height, width = size
    is_too_wide = record.width * height > record.height * width
    box_width = record.height * width / height if is_too_wide else float(record.width)
    box_height = float(record.height) if is_too_wide else record.width * height / width
    place = 0.5 if crop == "center" else _place(record.content_key, index)
    return Box(place * (record.width - box_width), place * (record.height - box_height), box_width, box_height)


def _place(content_key: str, index: int) -> float:
    """Draw the position of a crop along the longer side, uniform in [0, 1)."""
    return torch.rand((), dtype=torch.float64, generator=generator(0, f"crop:{content_key}", index)).item()
