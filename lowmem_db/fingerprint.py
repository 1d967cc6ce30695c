"""Content keys: short names for bytes and settings, equal only if these are equal."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 22


def of_file(path: Path) -> str:
    """Return the key of a file's bytes (hexadecimal, 32 digits)."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def of_files(paths: Iterable[Path]) -> str:
    """Return the key of several files: their names and bytes, ordered by name."""
    return of_values(*((path.name, of_file(path)) for path in sorted(paths)))


def of_values(*values: Any) -> str:
    """Return the key of JSON values (numbers, strings, lists, dictionaries, None)."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
