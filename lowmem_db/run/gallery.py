"""The annex of arXiv:2208.12242 for any folders of images: what is found in them, prompt by prompt, as a page."""

from collections.abc import Sequence
from pathlib import Path

from lowmem_db.evaluation.beside import find_methods, match_prompts, name_methods
from lowmem_db.evaluation.folders import Limits
from lowmem_db.reporting.gallery import Cell, GallerySubject, write_gallery


def show_side_by_side(
    folders: Sequence[Path], real: Path | None, names: Sequence[str], limits: Limits, page: Path
) -> None:
    """Write the page.

    Args:
        folders: The images of each method.
        real: Photos of the subject, or a folder with one folder of photos per subject.
        names: Name of each method. Empty: the names of the folders.
        limits: How much of them is shown.
        page: The HTML file.

    Raises:
        DataError: Something to be shown cannot be found or read.
        StorageError: The page cannot be written.
    """
    methods = name_methods(folders, names)
    subjects = []
    for of_methods in find_methods(folders, real, limits):
        rows = [
            (prompt, tuple(Cell(images=files, prompt=None if own == prompt else own) for own, files in cells))
            for prompt, cells in match_prompts(of_methods)
        ]
        subjects.append(GallerySubject(name=of_methods[0].name, photos=of_methods[0].photos, rows=tuple(rows)))
    write_gallery(page, methods, subjects)
