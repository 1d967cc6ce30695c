"""Small pictures of what was drawn: a strip for each run, sheets of strips."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from benchmarks.quality.variants import NUM_IMAGES
from lowmem_db.sampling.images import labelled_grid

if TYPE_CHECKING:
    from benchmarks.quality.runs import Drawn

THUMBNAIL = 80
COLOURS = 64
SHOWN = 2


def save_strip(drawn: "Drawn", path: Path) -> None:
    """Save the images of the subject, in each context, and of the class in a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = [drawn.plain, *drawn.contexts.values(), drawn.of_class]
    images = [image for group in groups for image in group]
    width, height = images[0].size
    strip = Image.new("RGB", (len(images) * width, height))
    for index, image in enumerate(images):
        strip.paste(image, (index * width, 0))
    strip.save(path)


def read_strip(path: Path) -> list[Image.Image]:
    """Return the images of a strip."""
    strip = Image.open(path).convert("RGB")
    side = strip.height
    return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]


def small(path: Path) -> Image.Image:
    """Return one picture, made small."""
    return _shrunk(Image.open(path).convert("RGB"))


def thumbnails(path: Path) -> list[Image.Image]:
    """Return the first two images of each prompt from a strip, made small."""
    return [_shrunk(image) for index, image in enumerate(read_strip(path)) if index % NUM_IMAGES < SHOWN]


def _shrunk(image: Image.Image) -> Image.Image:
    return image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)


def save_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path, colours: int = COLOURS) -> None:
    """Save labelled rows as a PNG of few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(rows, least_width=THUMBNAIL).quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
