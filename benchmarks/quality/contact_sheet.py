"""Small pictures of what was drawn: a strip for each run, sheets of strips."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lowmem_db.sampling.images import labelled_grid

if TYPE_CHECKING:
    from benchmarks.quality.runs import Drawn

THUMBNAIL = 80
COLOURS = 64


def save_strip(drawn: "Drawn", path: Path) -> None:
    """Save two images of the subject, two in the context and two of the class in a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [*drawn.plain[:2], *drawn.context[:2], *drawn.of_class[:2]]
    width, height = images[0].size
    strip = Image.new("RGB", (len(images) * width, height))
    for index, image in enumerate(images):
        strip.paste(image, (index * width, 0))
    strip.save(path)


def thumbnails(path: Path, count: int = 6) -> list[Image.Image]:
    """Return the images of a strip, made small."""
    strip = Image.open(path).convert("RGB")
    side = strip.height
    return [
        strip.crop((index * side, 0, (index + 1) * side, side)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        for index in range(count)
    ]


def save_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path) -> None:
    """Save labelled rows as a PNG of few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(rows).quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
