"""From a folder of photos to checked records, and from a file to sRGB pixels.

This module decides which picture files are allowed. Every file is decoded once before anything is loaded, so that a
damaged one is reported at the start of a run and not in the middle.
"""

import io
import logging
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

from lowmem_db import environment, fingerprint
from lowmem_db.console import say
from lowmem_db.data.captions import Captions
from lowmem_db.data.file_kinds import HEAD_BYTES, kind_of
from lowmem_db.data.folder import ALLOWED, PhotoFolder, look_into
from lowmem_db.errors import DataError, DependencyError
from lowmem_db.records import ImageRecord

MIN_PIXELS = 64
"""Shortest side that is worth enlarging to 512 pixels and more."""
MAX_MEGAPIXELS = 150
"""Largest picture that is decoded: 450 MB as RGB, and below Pillow's own limit (179)."""

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
_MAX_TEXT_BYTES = 1 << 26  # ComfyUI writes its workflow into a PNG, which can exceed Pillow's limit of a megabyte
_DECODING_ERRORS = (OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_log = logging.getLogger(__name__)


def scan_photos(folder: Path, *, prompt: str, resolution: int, field: str) -> list[ImageRecord]:
    """Check and describe every picture in a folder; sub-folders are not read.

    Args:
        folder: The folder. A text file with the same stem beside a picture, or a row of ``metadata.jsonl``, holds the
            picture's own prompt.
        prompt: Prompt of pictures without a caption. If empty, captions are not mentioned.
        resolution: Length in pixels to which the shorter side will be resized.
        field: The configuration field that named the folder, for messages.

    Returns:
        One record per picture, sorted by name.

    Raises:
        DataError: The folder does not exist, has no picture, or has unusable pictures; the message has a line for each.
    """
    found = look_into(folder, field)
    try:
        captions = Captions(found)
    except DataError as error:
        raise DataError(f"{field}: {error}") from error
    records, problems = [], [f"{field}: {line}" for line in found.broken]
    for path in found.photos:
        try:
            own = captions.of(path)
            records.append(_record(path, prompt if own is None else own, resolution))
        except (DataError, DependencyError) as error:
            problems.append(f"{field}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    for line in found.unread():
        _log.warning("%s: %s", field, line)
    if prompt:
        _tell(found, records, prompt, field)
    return records


def read_photo(path: Path) -> Image.Image:
    """Read the first frame of a picture as upright 8-bit sRGB, with transparent parts on white.

    A broken colour profile or EXIF block is ignored and logged.

    Raises:
        DataError: The file is missing, empty, damaged, in another format, or larger than ``MAX_MEGAPIXELS``.
        DependencyError: The file is HEIC and pillow-heif is not installed.
    """
    with _quiet_pillow():
        return _to_srgb(_upright(_decode(path), path), path)


def duplicates(records: Sequence[ImageRecord]) -> list[tuple[ImageRecord, ...]]:
    """Return the groups of records whose files are identical."""
    groups: dict[str, list[ImageRecord]] = {}
    for record in records:
        groups.setdefault(record.content_key, []).append(record)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def photo_warnings(
    records: Sequence[ImageRecord], *, resolution: int, field: str, aspect_ratio_buckets: bool = False
) -> list[str]:
    """Warn about what is allowed but makes the result worse: duplicate files, and pictures that must be enlarged.

    With aspect-ratio buckets a picture is enlarged if it has fewer pixels than the square, otherwise if its shorter
    side is shorter than ``resolution``.
    """
    repeated = [
        f"{field}: {', '.join(record.path.name for record in group)} are identical, so this photo counts "
        f"{len(group)} times; remove all but one"
        for group in duplicates(records)
    ]
    small = [
        record
        for record in records
        if (record.width * record.height if aspect_ratio_buckets else min(record.width, record.height) ** 2)
        < resolution**2
    ]
    names = ", ".join(f"{record.path.name} ({record.width} x {record.height})" for record in small)
    enlarged = f"{field}: enlarged to {resolution} pixels, which blurs them: {names}; larger originals train better"
    return repeated + [enlarged] * bool(small)


def _tell(found: PhotoFolder, records: Sequence[ImageRecord], prompt: str, field: str) -> None:
    """Say how many photos have captions, which captions have no photo, and which files are not read."""
    for line in found.orphans():
        _log.warning("%s: %s", field, line)
    own = sum(bool(found.captions[record.path]) or record.prompt != prompt for record in records)
    if own:
        rest = f"; the others use the prompt {prompt!r}" if own < len(records) else ""
        say(f"{field}: {own} of {len(records)} photos have their own caption{rest}")
    for line in found.remarks():
        say(f"{field}: {line}")


def _record(path: Path, prompt: str, resolution: int) -> ImageRecord:
    width, height = read_photo(path).size
    smallest = min(resolution, max(MIN_PIXELS, resolution // 4))
    if min(width, height) < smallest:
        raise DataError(
            f"{path}: is {width} x {height} pixels, too small to be enlarged to {resolution}; allowed: "
            f"{smallest} or more on the shorter side. Use a larger original, or a lower data.resolution"
        )
    return ImageRecord(
        path=path,
        content_key=fingerprint.of_file(path),
        width=width,
        height=height,
        prompt=prompt,
    )


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings: sizes are checked here, and unusual metadata does not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT_BYTES
        try:
            yield
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits


def _decode(path: Path) -> Image.Image:
    try:
        with _open(path) as image:
            _check_size(path, image.width, image.height)
            _tell_frames(path, image)
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {_too_large(str(error))}") from error
    except _DECODING_ERRORS as error:
        raise DataError(f"{path}: {_undecodable(path, error)}") from error


def _open(path: Path) -> Image.Image:
    kind = _kind(path)
    if kind == "AVIF" and not features.check("avif"):
        raise DependencyError(
            f"{path}: is AVIF, which this version of Pillow cannot read: pip install -U pillow, or save it as PNG"
        )
    if kind != "HEIC":
        return Image.open(path, formats=_FORMATS)
    try:
        environment.require("pillow_heif").register_heif_opener()
    except DependencyError as error:
        raise DependencyError(f"{path}: is HEIC: {error}, or save it as JPEG") from error
    return Image.open(path, formats=("HEIF",))


def _kind(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise DataError(f"{path}: is empty (0 bytes); allowed: {ALLOWED}. Copy it again, or remove it")
    return kind_of(head)


def _undecodable(path: Path, error: Exception) -> str:
    """Say why a file cannot be decoded: it is another kind of file, or damaged."""
    reason = " ".join(str(error).split()).replace(str(path), path.name)
    if not path.is_file() or not os.access(path, os.R_OK):
        return f"cannot be read ({reason}); allowed: {ALLOWED}. Check its permissions"
    kind = _kind(path)
    if kind is not None and kind not in ALLOWED:
        return f"is {kind}; allowed: {ALLOWED}. Save the picture as one of these, or remove the file"
    return (
        f"cannot be decoded; it is damaged or truncated ({reason}); allowed: {ALLOWED}. Save it again from the "
        "original, or remove it"
    )


def _tell_frames(path: Path, image: Image.Image) -> None:
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # a phone's photo with its depth map or second view
        _warn_once(f"{path}: has {count} pictures; only the first one is used")


@cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise DataError(f"{path}: {_too_large(f'{width} x {height} pixels')}")


def _too_large(size: str) -> str:
    return f"is too large ({size}); allowed: up to {MAX_MEGAPIXELS} megapixels. Reduce it: 4000 pixels are plenty"


def _upright(image: Image.Image, path: Path) -> Image.Image:
    """Apply the EXIF orientation."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODING_ERRORS as error:
        _log.warning(
            "%s: its EXIF block is broken and was ignored (%s); check that the picture is upright", path, error
        )
        return image
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    """Convert any Pillow mode to sRGB on white."""
    profile = image.info.get("icc_profile")
    colour, alpha = _split_alpha(_to_8_bits(image, path))
    rgb = _apply_profile(colour, profile, path) if profile else colour.convert("RGB")
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def _to_8_bits(image: Image.Image, path: Path) -> Image.Image:
    """Scale greyscale with 16 bits or more to 8 bits; Pillow would clip it."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise DataError(f"{path}: has {count} pixels that are infinite or NaN; save it again as 8-bit PNG or JPEG")
    grey = np.clip(values * (255 / _white(image.mode, float(values.max()))), 0, 255)
    return Image.fromarray(grey.round().astype(np.uint8))


def _white(mode: str, largest: float) -> float:
    """Return the value of white: the smallest usual one for the mode that is not below the largest value."""
    usual = (1.0, 255.0, 65535.0) if mode == "F" else (65535.0, 2.0**31 - 1)
    return next((white for white in usual if largest <= white), largest)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in mode L, RGB or CMYK, and the alpha channel or None."""
    grey = image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return (image if image.mode == "CMYK" else image.convert("L" if grey else "RGB")), None
    # Pillow converts premultiplied modes only to RGBA or LA, which un-premultiplies them.
    image = image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB"), image.getchannel("A")


def _apply_profile(colour: Image.Image, profile: bytes, path: Path) -> Image.Image:
    """Convert from an embedded ICC profile to sRGB."""
    is_for_rgb = profile[16:20] == b"RGB "
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        pixels = colour.convert("RGB") if is_for_rgb else colour
        converted = ImageCms.profileToProfile(pixels, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, *_DECODING_ERRORS) as error:
        _log.warning("%s: its colour profile is broken and was ignored (%s); colours may be slightly off", path, error)
        return colour.convert("RGB")
    return converted or colour.convert("RGB")
