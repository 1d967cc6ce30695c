"""The small picture that other programs show beside a file: a sample of the run, without metadata."""

import base64
from io import BytesIO
from pathlib import Path

from PIL import Image

THUMBNAIL_KEY = "modelspec.thumbnail"
_SIDE = 256


def thumbnail_text(sample: Path) -> str:
    """Return a small copy of an image that the run has drawn, as JPEG in base64."""
    buffer = BytesIO()
    with Image.open(sample) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        Image.frombytes("RGB", small.size, small.tobytes()).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
