"""What images were drawn with, written beside them, so that only images that were drawn alike are used together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_db.storage.run_folder import read_json, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Write down what images are drawn with, before the first of them is.

    Raises:
        StorageError: The disk is full.
    """
    write_json(folder / MANIFEST, dict(wanted))


def differences(folder: Path, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what the images of a folder were drawn with and what is wanted, where these differ.

    Args:
        folder: It may have no manifest: then nothing differs.
        wanted: What the images are wanted with.
    """
    if not (folder / MANIFEST).is_file():
        return {}
    found = read_json(folder / MANIFEST) or {}
    return {name: (found.get(name), value) for name, value in wanted.items() if found.get(name) != value}
