"""A record of the settings that images were drawn with, so that images with different settings are not mixed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_db.data.folder import MANIFEST
from lowmem_db.storage.run_folder import read_json, write_json


def write_manifest(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Write the settings of images, before the first of them is drawn.

    Raises:
        StorageError: The disk is full.
    """
    write_json(folder / MANIFEST, dict(wanted))


def differences(folder: Path, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between a folder's images and what is wanted, as (found, wanted).

    Args:
        folder: The folder; if it has no manifest, nothing differs.
        wanted: The wanted settings.
    """
    if not (folder / MANIFEST).is_file():
        return {}
    found = read_json(folder / MANIFEST) or {}
    return {name: (found.get(name), value) for name, value in wanted.items() if found.get(name) != value}
