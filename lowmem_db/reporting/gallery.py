"""The annex of arXiv:2208.12242 as a page: real photos beside the images of several methods, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_db.reporting.pictures import thumbnail
from lowmem_db.reporting.rendering import fill
from lowmem_db.storage.atomic import write_text

_PIXELS = 320
_NO_PROMPT = "without a prompt"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one method has drawn for one prompt.

    Attributes:
        images: Files; empty if it has drawn none.
        prompt: Its own prompt, where it differs from that of the row.
    """

    images: tuple[Path, ...]
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class GallerySubject:
    """One subject of a gallery.

    Attributes:
        name: Name of the subject.
        photos: Real photos; at least one.
        rows: Each prompt, or None if it is not known, with a cell for each method.
    """

    name: str
    photos: tuple[Path, ...]
    rows: tuple[tuple[str | None, tuple[Cell, ...]], ...]


def write_gallery(output: Path, methods: Sequence[str], subjects: Sequence[GallerySubject]) -> None:
    """Write the page: one file with small copies of all pictures, without their metadata, names or paths.

    Args:
        output: The HTML file.
        methods: Names of the methods, in the order of the cells.
        subjects: What it shows.

    Raises:
        StorageError: It cannot be written.
    """
    write_text(
        output,
        fill("gallery.html", title=", ".join(methods), subjects=[_view(subject, methods) for subject in subjects]),
    )


def _view(subject: GallerySubject, methods: Sequence[str]) -> dict[str, Any]:
    photos = _thumbnails(subject.photos)
    return {
        "name": subject.name,
        "photos": photos,
        "rows": [
            {
                "prompt": prompt or _NO_PROMPT,
                "photo": photos[number % len(photos)],
                "methods": [
                    {"name": name, "images": _thumbnails(cell.images), "prompt": cell.prompt}
                    for name, cell in zip(methods, cells, strict=True)
                ],
            }
            for number, (prompt, cells) in enumerate(subject.rows)
        ],
    }


def _thumbnails(files: Sequence[Path]) -> list[str]:
    return [address for file in files if (address := thumbnail(file, _PIXELS)) is not None]
