"""Pictures inside a page: small copies without metadata, as data addresses."""

import base64
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps

_QUALITY = 85
_LARGEST_SIDE = 20_000


def thumbnail(path: Path, pixels: int) -> str | None:
    """Return a small copy as a ``data:`` address; arguments and result as for :func:`thumbnail_bytes`."""
    content = thumbnail_bytes(path, pixels)
    return None if content is None else _as_address(content)


def address_of(image: Image.Image) -> str:
    """Return a whole picture as a ``data:`` address."""
    return _as_address(_as_jpeg(image))


def thumbnail_bytes(path: Path, pixels: int) -> bytes | None:
    """Return a small copy as JPEG, without EXIF or other metadata; None if it cannot be read.

    Args:
        path: A picture.
        pixels: Length of its longer side in the page.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")
            if max(opened.size) > _LARGEST_SIDE:
                return None
            opened.draft("RGB", (2 * pixels, 2 * pixels))
            image = ImageOps.exif_transpose(opened).convert("RGB")
            image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return _as_jpeg(image)


def _as_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _as_address(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
