"""Checksums of files, so that bit rot on a disk is noticed when a file is read.

A manifest in each folder holds the checksums of its files. A CRC-32 detects every flipped bit and every burst of up to
32, at 0.4 s of processor time per GB; it does not protect against tampering.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lowmem_db.errors import StorageError
from lowmem_db.storage.atomic import write_folder, write_text
from lowmem_db.storage.disk import flush_tree

MANIFEST = "checksums.json"
"""Manifest of a folder; in a checkpoint, the marker is the manifest instead."""

_CHUNK_BYTES = 1 << 22


def of_file(path: Path) -> str:
    """Return the checksum of a file."""
    value = 0
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:read], value)
    return _named(value)


def of_bytes(parts: Iterable[bytes | memoryview]) -> str:
    """Return the checksum of the concatenated parts."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return _named(value)


def of_folder(folder: Path) -> dict[str, str]:
    """Flush a folder to the disk and at the same time compute the checksums of its files, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=1) as pool:
        found = pool.map(of_file, files)
        flush_tree(folder)
        return {file.relative_to(folder).as_posix(): checksum for file, checksum in zip(files, found, strict=True)}


def write_checked_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically, with a manifest of the checksums of its files.

    Raises:
        StorageError: The disk is full; an existing folder at ``path`` is untouched.
    """

    def write_and_sum(folder: Path) -> None:
        write(folder)
        write_text(folder / MANIFEST, manifest_text(of_folder(folder)))

    write_folder(path, write_and_sum)


def manifest_text(checksums: Mapping[str, str], **values: Any) -> str:
    """Return the text of a manifest."""
    return json.dumps({**values, "checksums": dict(checksums)}, indent=2) + "\n"


def check_file(path: Path, manifest: Path) -> bool:
    """Compare a file with its manifest; return False if that is missing or has no checksums because of its age.

    Raises:
        StorageError: The file is missing, not in the manifest, or has changed; or the manifest is damaged.
    """
    checksums = _read_manifest(manifest)
    if checksums is None:
        return False
    _check(path, checksums.get(path.relative_to(manifest.parent).as_posix()), manifest)
    return True


def check_folder(folder: Path, manifest_name: str = MANIFEST, *, below: str = "") -> bool:
    """Compare all files with their manifest; return False if that is missing or has no checksums because of its age.

    Args:
        folder: The folder.
        manifest_name: Name of its manifest.
        below: Only check the files whose relative path begins with this.

    Raises:
        StorageError: A file is missing or has changed; or the manifest is damaged.
    """
    manifest = folder / manifest_name
    checksums = _read_manifest(manifest)
    if checksums is None:
        return False
    for name, checksum in checksums.items():
        if name.startswith(below):
            _check(folder / name, checksum, manifest)
    return True


def _check(path: Path, checksum: str | None, manifest: Path) -> None:
    if checksum is None:
        raise StorageError(f"{path}: is not listed in {manifest.name}, so this program did not write it")
    try:
        found = of_file(path)
    except FileNotFoundError:
        raise StorageError(f"{path}: does not exist") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    if found != checksum:
        way_out = f"; make it again or, if you changed it yourself, delete {MANIFEST}"
        own_change = way_out if manifest.name == MANIFEST else ""
        raise StorageError(
            f"{path}: is damaged: its checksum is {found}, but {manifest.name} has {checksum}{own_change}"
        )


def _read_manifest(path: Path) -> dict[str, str] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: is damaged ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):  # an older version wrote the step
        return None
    checksums = found.get("checksums")
    if not isinstance(checksums, dict) or not all(isinstance(value, str) for value in checksums.values()):
        raise StorageError(f"{path}: is damaged (it holds no checksums)")
    if any(".." in Path(name).parts or Path(name).is_absolute() for name in checksums):
        raise StorageError(f"{path}: is damaged (it names files outside its folder)")
    return checksums


def _named(value: int) -> str:
    return f"crc32:{value:08x}"
