"""Checksums of files: bits that rot on a disk are found when they are read.

The checksums of the files of a folder stand in one manifest in it. A CRC-32 finds every flipped bit and every burst of
up to 32, at 0.4 s of processor time per GB; it is no protection against somebody who wants to deceive.
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
"""Manifest of a folder that is no checkpoint, whose manifest is its marker."""

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
    """Return the checksum of bytes, one part after another."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return _named(value)


def of_folder(folder: Path) -> dict[str, str]:
    """Force a folder to the disk and return the checksums of its files, by their paths in it; both at the same time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=1) as pool:
        found = pool.map(of_file, files)
        flush_tree(folder)
        return {file.relative_to(folder).as_posix(): checksum for file, checksum in zip(files, found, strict=True)}


def write_checked_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, whole or not at all, with a manifest of the checksums of its files.

    Raises:
        StorageError: The disk is full; what stood at ``path`` still stands.
    """

    def write_and_sum(folder: Path) -> None:
        write(folder)
        write_text(folder / MANIFEST, manifest_text(of_folder(folder)))

    write_folder(path, write_and_sum)


def manifest_text(checksums: Mapping[str, str], **values: Any) -> str:
    """Return what a manifest holds."""
    return json.dumps({**values, "checksums": dict(checksums)}, indent=2) + "\n"


def check_file(path: Path, manifest: Path) -> bool:
    """Compare a file with its manifest; return False where that is missing or older than checksums.

    Raises:
        StorageError: The file is missing, unknown to the manifest, or not what was written; or the manifest is damaged.
    """
    checksums = _read_manifest(manifest)
    if checksums is None:
        return False
    _check(path, checksums.get(path.relative_to(manifest.parent).as_posix()), manifest)
    return True


def check_folder(folder: Path, manifest_name: str = MANIFEST) -> bool:
    """Compare every file of a manifest with it; return False where that is missing or older than checksums.

    Raises:
        StorageError: A file is missing or not what was written; or the manifest is damaged.
    """
    manifest = folder / manifest_name
    checksums = _read_manifest(manifest)
    if checksums is None:
        return False
    for name, checksum in checksums.items():
        _check(folder / name, checksum, manifest)
    return True


def _check(path: Path, checksum: str | None, manifest: Path) -> None:
    if checksum is None:
        raise StorageError(f"{path}: {manifest.name} beside it does not know it, so it is not of this program's making")
    try:
        found = of_file(path)
    except FileNotFoundError:
        raise StorageError(f"{path}: there is no such file") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    if found != checksum:
        raise StorageError(f"{path}: is damaged: its checksum is {found}, that in {manifest.name} is {checksum}")


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
