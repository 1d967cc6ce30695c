"""A comic as a page: its panels, and their words for those who do not see them."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lowmem_db.reporting.pictures import address_of
from lowmem_db.reporting.rendering import fill
from lowmem_db.storage.atomic import write_text


def write_comic_page(output: Path, title: str, panels: Sequence[tuple[Image.Image, str]]) -> None:
    """Write the page: one file without network.

    Args:
        output: The HTML file.
        title: Its title.
        panels: Each panel with its words in it, and these words as text.

    Raises:
        StorageError: It cannot be written.
    """
    shown = [{"picture": address_of(picture), "words": words} for picture, words in panels]
    write_text(output, fill("comic.html", title=title, panels=shown))
