"""From tensors to pictures, and from pictures to a labelled grid."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lowmem_db.console import warn
from lowmem_db.storage.atomic import as_storage_error
from lowmem_db.storage.disk import check_path

GRID_FILE = "grid.png"
_MARGIN = 4
_LABEL_HEIGHT = 18


def to_images(pixels: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Return 8-bit pictures from values in [-1, 1]."""
    scaled = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in scaled]


def to_pixels(images: Sequence[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    """Return values in [-1, 1] from 8-bit pictures of one size."""
    stacked = torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def is_black(image: Image.Image) -> bool:
    """Return whether every pixel is black."""
    return image.convert("RGB").getbbox() is None


def make_folder(folder: Path) -> None:
    """Create the folder for pictures, before the first of them is drawn.

    Raises:
        StorageError: It cannot be created.
    """
    check_path(folder.absolute(), "--output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_storage_error(error, folder) from error


def save_rows(
    folder: Path, rows: Sequence[tuple[str, Sequence[Image.Image]]], names: Sequence[str] | None = None
) -> None:
    """Save each picture as ``ROW-IMAGE.png`` and a grid of all; images are numbered from zero.

    Args:
        folder: An existing folder.
        rows: Labels and pictures.
        names: Names of the rows. Default: their numbers, from zero.

    Raises:
        StorageError: The disk is full.
    """
    try:
        for number, (label, pictures) in enumerate(rows):
            name = f"{number:02d}" if names is None else names[number]
            for index, picture in enumerate(pictures):
                if is_black(picture):
                    warn(f"image {index} of {label!r} is completely black, although all values are finite")
                picture.save(folder / f"{name}-{index:02d}.png")
        labelled_grid(rows).save(folder / GRID_FILE)
    except OSError as error:
        raise as_storage_error(error, folder) from error


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], *, least_width: int = 96) -> Image.Image:
    """Return one picture with a row for each label and the label above it.

    Args:
        rows: Labels and pictures, all of one size.
        least_width: Pictures that are narrower, in pixels, are shown a whole number of times as large.
    """
    times = -(-least_width // rows[0][1][0].width)
    width, height = (times * side for side in rows[0][1][0].size)
    columns = max(len(pictures) for _, pictures in rows)
    row_height = height + _LABEL_HEIGHT + _MARGIN
    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, len(rows) * row_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for row, (label, pictures) in enumerate(rows):
        top = row * row_height + _MARGIN
        draw.text((_MARGIN, top), _shortened(label, sheet.width - 2 * _MARGIN, font), fill="black", font=font)
        for column, picture in enumerate(pictures):
            shown = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (column * (width + _MARGIN) + _MARGIN, top + _LABEL_HEIGHT))
    return sheet


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    num_fitting = bisect_right(range(len(text)), width, key=lambda length: font.getlength(text[:length] + "…"))
    return text[: max(0, num_fitting - 1)] + "…"
