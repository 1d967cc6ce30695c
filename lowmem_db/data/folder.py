"""Sorts the files of a photo folder: photos, their captions, and what is not read and why.

Nothing is decoded here and nothing heavy is imported, so that a wrong folder is reported at once.
"""

import difflib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lowmem_db.errors import DataError

ALLOWED = "JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP or GIF"
CAPTION_TABLE = "metadata.jsonl"
"""Captions of a Hugging Face image folder."""

PHOTO_SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".hif", ".tif", ".tiff", ".bmp",
        ".gif",
    )
)  # fmt: skip
CAPTION_SUFFIXES = frozenset((".txt", ".caption"))
_REASONS = {
    ".csv": "captions in CSV are not supported: write metadata.jsonl or a text file for each photo",
    ".npz": "latents of other programs are not supported",
    ".json": "not a picture", ".jsonl": "not a picture", ".yaml": "not a picture", ".yml": "not a picture",
    ".toml": "not a picture", ".md": "not a picture", ".ini": "not a picture", ".db": "not a picture",
}  # fmt: skip

MANIFEST = "manifest.json"
"""How the pictures of a folder were drawn, written beside them."""


@dataclass(frozen=True)
class LeftOver:
    """A file or folder that is not read.

    Attributes:
        name: Its name.
        reason: Why it is not read.
        is_expected: Whether nobody would expect it to be read.
    """

    name: str
    reason: str
    is_expected: bool = False


@dataclass(frozen=True)
class PhotoFolder:
    """The photos of a folder with their captions, and what is left over.

    Attributes:
        path: The folder.
        photos: Files with the suffix of a picture, sorted by name.
        captions: The caption files of each photo: one, or several that must agree.
        table: The caption table, or None.
        without_photo: Caption files without a photo.
        left_over: Everything else.
        broken: One line for each entry that cannot be read at all, such as a dangling link.
    """

    path: Path
    photos: tuple[Path, ...]
    captions: dict[Path, tuple[Path, ...]]
    table: Path | None
    without_photo: tuple[Path, ...]
    left_over: tuple[LeftOver, ...]
    broken: tuple[str, ...]

    def remarks(self) -> list[str]:
        """Return a line about files that nobody would expect to be read."""
        left = [entry for entry in self.left_over if entry.is_expected and entry.name != MANIFEST]
        expected = [f"{entry.name} ({entry.reason})" for entry in left]
        return [f"not read: {', '.join(expected)}"] * bool(expected)

    def orphans(self) -> list[str]:
        """Return a line for each caption without a photo."""
        return [f"{file.name} is a caption without a photo{self._nearest(file)}" for file in self.without_photo]

    def unread(self) -> list[str]:
        """Return one line per reason about files that somebody may expect to be read."""
        lines: list[str] = []
        unexpected = [entry for entry in self.left_over if not entry.is_expected]
        for reason in dict.fromkeys(entry.reason for entry in unexpected):
            names = ", ".join(entry.name for entry in unexpected if entry.reason == reason)
            lines.append(f"not read: {names}; {reason}")
        return lines

    def _nearest(self, caption: Path) -> str:
        stems = {photo.stem: photo.name for photo in self.photos if not self.captions[photo]}
        found = difflib.get_close_matches(caption.stem, stems, n=1)
        return f"; is it for {stems[found[0]]}?" if found else ""


def look_into(folder: Path, field: str) -> PhotoFolder:
    """Sort the files of a photo folder; sub-folders are not read.

    Args:
        folder: The folder.
        field: The configuration field that named it, for messages.

    Raises:
        DataError: The folder does not exist, cannot be read, or holds no picture.
    """
    files, left_over, broken = _sort(_entries(folder, field))
    photos = tuple(file for file in files if file.suffix.lower() in PHOTO_SUFFIXES)
    captions = [file for file in files if file.suffix.lower() in CAPTION_SUFFIXES]
    table = next((file for file in files if file.name == CAPTION_TABLE), None)
    belonging = {photo: tuple(file for file in captions if _belongs(file, photo)) for photo in photos}
    used = {file for found in belonging.values() for file in found}
    others = [file for file in files if file not in {*photos, *captions, table}]
    if not photos:
        names = [*(file.name for file in files), *(entry.name for entry in left_over)]
        raise DataError("\n".join([*(f"{field}: {line}" for line in broken), _no_photos(field, folder, names)]))
    return PhotoFolder(
        path=folder,
        photos=photos,
        captions=belonging,
        table=table,
        without_photo=tuple(file for file in captions if file not in used),
        left_over=(*left_over, *map(_left_over, others)),
        broken=tuple(broken),
    )


def holds_nothing(folder: Path) -> bool:
    """Return whether a folder is as good as empty: it holds at most what systems leave there, such as ``Thumbs.db``."""
    files, left_over, broken = _sort(folder.iterdir())
    return not broken and all(entry.reason == "hidden" for entry in left_over) and all(map(is_negligible, files))


def is_negligible(file: Path) -> bool:
    """Return whether nobody would miss a file, because it is hidden or no picture by its name."""
    return file.name.startswith(".") or (file.is_file() and _left_over(file).is_expected)


def same_name(name: str) -> str:
    """Return a name in the form for comparison: without case, and with one spelling of letters such as ``é``."""
    return unicodedata.normalize("NFC", name).casefold()


def _entries(folder: Path, field: str) -> list[Path]:
    try:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise DataError(f"{field}: {folder} {what}; allowed: a folder of pictures{_nearest(folder)}")
        return sorted(folder.iterdir(), key=lambda entry: entry.name)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise DataError(
            f"{field}: {str(folder)[:300]} cannot be read ({reason}); allowed: a folder of pictures. Check its "
            "permissions, or choose another one"
        ) from error


def _sort(entries: Iterable[Path]) -> tuple[list[Path], list[LeftOver], list[str]]:
    """Return the files, the entries that are not read, and one line for each entry that cannot be read."""
    files: list[Path] = []
    left_over: list[LeftOver] = []
    broken: list[str] = []
    for entry in entries:
        if entry.name.startswith("."):
            left_over.append(LeftOver(entry.name, "hidden", is_expected=True))
        elif entry.is_symlink() and not entry.exists():
            broken.append(
                f"{entry}: is a link to {entry.readlink()}, which does not exist; allowed: pictures. Remove it"
            )
        elif entry.is_dir():
            left_over.append(LeftOver(entry.name, "a sub-folder", is_expected=True))
        elif not entry.is_file():
            left_over.append(LeftOver(entry.name, "not a regular file"))
        else:
            files.append(entry)
    return files, left_over, broken


def _belongs(caption: Path, photo: Path) -> bool:
    """Return whether a caption file is ``dog.txt`` or ``dog.jpg.txt`` beside ``dog.jpg``, whatever the case."""
    return same_name(caption.stem) in {same_name(photo.stem), same_name(photo.name)}


def _left_over(file: Path) -> LeftOver:
    reason = _REASONS.get(file.suffix.lower())
    if reason is None:
        return LeftOver(file.name, f"pictures are {ALLOWED} files")
    return LeftOver(file.name, reason, is_expected=reason == "not a picture")


def _nearest(folder: Path) -> str:
    """Return a hint about the folder that was probably meant."""
    parent = folder.absolute().parent
    names = list(_folders_in(parent)) if parent.is_dir() else []
    found = difflib.get_close_matches(folder.name, names, n=1)
    return f"; did you mean {folder.parent / found[0]}?" if found else f"; relative paths start at {Path.cwd()}"


def _folders_in(parent: Path) -> Iterator[str]:
    try:
        yield from (entry.name for entry in parent.iterdir() if entry.is_dir())
    except OSError:  # not readable: no hint
        return


def _no_photos(field: str, folder: Path, names: list[str]) -> str:
    holds = f"holds no picture (only {', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else "is empty"
    what = "3 to 5 photos of the subject" if field == "subject.instance_dir" else "pictures"
    return (
        f"{field}: {folder} {holds}; allowed: {ALLOWED} files in the folder itself, not in sub-folders. "
        f"Put {what} there"
    )
