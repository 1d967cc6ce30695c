"""The prompt of a single photo: from a text file beside it, or from a table in the folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowmem_db.data.folder import PhotoFolder, same_name
from lowmem_db.errors import DataError

MAX_CAPTION_BYTES = 1 << 14
MAX_TABLE_BYTES = 1 << 24
_COLUMNS = ("text", "caption", "prompt")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class Captions:
    """The captions of a folder.

    Args:
        found: The files of the folder.

    Raises:
        DataError: Its table cannot be used.
    """

    def __init__(self, found: PhotoFolder) -> None:
        self._files = found.captions
        self._table = {} if found.table is None else read_table(found.table, found.photos)
        self._table_file = found.table

    def of(self, photo: Path) -> str | None:
        """Return the caption of a photo, or None if it has none.

        Raises:
            DataError: A file cannot be used, or two captions differ.
        """
        found = {file: read_caption(file) for file in self._files[photo]}
        if self._table_file is not None and photo in self._table:
            found[self._table_file] = self._table[photo]
        if len(set(found.values())) > 1:
            raise DataError(
                f"{photo}: has different captions in {', '.join(file.name for file in found)}; allowed: one. Remove "
                "the others"
            )
        return next(iter(found.values()), None)


def read_caption(path: Path) -> str:
    """Read a caption file, its lines joined.

    Raises:
        DataError: It cannot be read, is not UTF-8 text, is empty, or is longer than any prompt.
    """
    caption = " ".join(_read_text(path, MAX_CAPTION_BYTES, "the prompt of the picture beside it").split())
    if not caption:
        raise DataError(
            f"{path}: is empty; allowed: the prompt of the picture beside it. Write one, or remove the file to use "
            "subject.instance_prompt"
        )
    return caption


def read_table(path: Path, photos: Iterable[Path]) -> dict[Path, str]:
    """Read ``metadata.jsonl``: one row per photo, with its ``file_name`` and its ``text``.

    Raises:
        DataError: A row is not a JSON object or names no file; or a photo does not exist or has two rows.
    """
    by_name = {same_name(photo.name): photo for photo in photos}
    captions: dict[Path, str] = {}
    for number, line in enumerate(_read_text(path, MAX_TABLE_BYTES, "a table of captions").splitlines(), 1):
        if not line.strip():
            continue
        row = _parse_row(line, f"{path}: line {number}")
        photo = by_name.get(same_name(row["file_name"]))
        if photo is None or photo in captions:
            what = "is not in this folder" if photo is None else "appears twice"
            raise DataError(
                f"{path}: line {number}: file_name {row['file_name']!r} {what}; allowed: each photo in this folder, "
                "once. Correct the row, or remove it"
            )
        text = next((row[name] for name in _COLUMNS if isinstance(row.get(name), str)), "")
        if caption := " ".join(text.split()):
            captions[photo] = caption
    return captions


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DataError(
            f'{where}: is not a caption row; allowed: {{"file_name": "dog.jpg", "text": "a photo of a dog"}}. Correct '
            "it, or remove the file"
        )
    return row


def _read_text(path: Path, max_bytes: int, what: str) -> str:
    """Read a UTF-8 text file, but never more than ``max_bytes``."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise DataError(
                f"{path}: has {path.stat().st_size:,} bytes; allowed: {what}, {max_bytes:,} bytes at most. Shorten it"
            )
        if content[:2] in _UTF_16:
            raise DataError(f"{path}: is UTF-16; allowed: UTF-8 text. Save it again as UTF-8")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); allowed: UTF-8 text. Save it again as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path}: holds NUL characters; allowed: UTF-8 text. Save it again as UTF-8")
    return text
