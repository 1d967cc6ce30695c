"""A comic about the subject of a run: what is drawn for its script, and the picture and the page made of that."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lowmem_db.errors import DataError
from lowmem_db.reporting.comic import write_comic_page
from lowmem_db.run.inputs import config_of
from lowmem_db.sampling.comic import COMIC_FILE, PAGE_FILE, compose, draw_panels, read_script
from lowmem_db.sampling.prompts import fill_in
from lowmem_db.storage.atomic import write_file


class Comic:
    """A script that has been read and whose prompts are complete.

    Args:
        path: The script.
        source: The run or model that draws it.
        identifier: Rare token of the subject. Default: that of the run.
        class_noun: Class of the subject. Default: that of the run.

    Raises:
        DataError: The script cannot be used, or identifier and class noun are not known.
    """

    def __init__(self, path: Path, source: str, identifier: str | None, class_noun: str | None) -> None:
        self._path = path
        self._script = read_script(path)
        self.prompts = fill_in(
            f"--comic: {path}",
            [panel.prompt for panel in self._script.panels],
            identifier=identifier,
            class_noun=class_noun,
            run_config=config_of(source),
        )

    def num_images(self, wanted: int | None) -> int:
        """Return how many images of each prompt are drawn.

        Raises:
            DataError: A panel shows an image that would not be drawn.
        """
        needed = 1 + max(panel.image for panel in self._script.panels)
        if wanted is not None and wanted < needed:
            raise DataError(
                f"--num-images: {wanted}, but {self._path} shows image {needed - 1}, counted from 0; allowed: at least "
                f"{needed}"
            )
        return wanted or needed

    def write(self, folder: Path, pictures: Sequence[Sequence[Image.Image]]) -> None:
        """Write the picture and the page.

        Args:
            folder: An existing folder.
            pictures: The images of each prompt.

        Raises:
            StorageError: The disk is full.
        """
        panels = draw_panels(self._script, pictures)
        comic = compose(self._script, panels)
        write_file(folder / COMIC_FILE, lambda path: comic.save(path, format="PNG"))
        texts = [
            " ".join(filter(None, (prompt, panel.words and f"\u201c{panel.words}\u201d", panel.caption)))
            for prompt, panel in zip(self.prompts, self._script.panels, strict=True)
        ]
        title = self._script.title or "A comic"
        write_comic_page(folder / PAGE_FILE, title, list(zip(panels, texts, strict=True)))
