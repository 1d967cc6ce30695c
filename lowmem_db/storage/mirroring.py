"""A folder whose files also lie in another folder, without being stored twice where the disk supports that."""

import os
import shutil
from functools import partial
from pathlib import Path

from lowmem_db.storage.atomic import write_file, write_folder


def mirror(source: Path, target: Path) -> None:
    """Put everything in a folder into another folder too: hard links, or copies on a disk without them.

    Sub-folders and files that exist in the target are replaced, one by one and atomically; files of the folder itself
    come last, so that an index is there only if all is there. Other contents of the target are untouched.

    Raises:
        StorageError: The disk is full, or the target cannot be written.
    """
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.is_file(), entry.name)):
        if entry.is_file():
            write_file(target / entry.name, partial(_link, entry))
        else:
            write_folder(target / entry.name, partial(_link_all, entry))


def _link_all(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links on this disk
        shutil.copyfile(source, target)
