"""A picture of what training will see: each photo with its crops outlined, then the crops themselves."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lowmem_db.data.crops import Box
from lowmem_db.data.inspection import Inspection, SeenPhoto
from lowmem_db.data.likeness import BLURRED

MAX_ROWS = 60
_TILE = 176
_MARGIN = 8
_LINE = 15
_TEXT_LINES = 2
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
_LEAST_WIDTH = 640


def contact_sheet(found: Inspection) -> Image.Image:
    """Return a sheet with a row for each photo, at most ``MAX_ROWS``."""
    shown = found.photos[:MAX_ROWS]
    columns = 1 + max((len(photo.crops) for photo in shown), default=0)
    row_height = _TEXT_LINES * _LINE + _TILE + 2 * _MARGIN
    width = max(_LEAST_WIDTH, columns * (_TILE + _MARGIN) + _MARGIN)
    notes = _notes(found)
    height = len(shown) * row_height + _MARGIN + _LINE * (len(notes) + 1)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for row, photo in enumerate(shown):
        top = row * row_height + _MARGIN
        for line, text in enumerate(_words(photo)):
            draw.text((_MARGIN, top + line * _LINE), _fitting(text, width - 2 * _MARGIN, font), "black", font)
        for column, tile in enumerate(_tiles(photo)):
            sheet.paste(tile, (_MARGIN + column * (_TILE + _MARGIN), top + _TEXT_LINES * _LINE + 2))
    for line, text in enumerate(notes):
        place = (_MARGIN, len(shown) * row_height + _MARGIN + line * _LINE)
        draw.text(place, _fitting(text, width - 2 * _MARGIN, font), "black", font)
    return sheet


def _words(photo: SeenPhoto) -> Sequence[str]:
    record, (height, width) = photo.record, photo.size
    blur = " (blurred)" if photo.sharpness < BLURRED else ""
    enlarged = ", enlarged" if any(crop.height < height for crop in photo.crops) else ""
    whose = "its caption: " if photo.has_caption else "the prompt: " if record.prompt else "no caption of its own"
    return (
        f"{record.path.name}: {record.width} x {record.height}, trained at {width} x {height}{enlarged}, sharpness "
        f"{photo.sharpness:.0f}{blur}",
        f"{whose}{record.prompt}",
    )


def _notes(found: Inspection) -> list[str]:
    more = len(found.photos) - MAX_ROWS
    return [*([f"and {more} more photos"] if more > 0 else []), found.captions, *found.problems, *found.warnings]


def _tiles(photo: SeenPhoto) -> list[Image.Image]:
    """Return the photo with its crops outlined, and each crop as it is trained."""
    whole = photo.image.copy()
    scale = whole.width / photo.record.width
    outlines = ImageDraw.Draw(whole)
    line = max(2, round(max(whole.size) / _TILE * 2))
    cut = []
    for number, crop in enumerate(photo.crops):
        corners = _corners(crop, scale)
        tile = _in_tile(photo.image.resize(_tile_size(crop), Image.Resampling.LANCZOS, box=_within(corners, whole)))
        ImageDraw.Draw(tile).line([(0, _TILE - 1), (_TILE, _TILE - 1)], _COLOURS[number % len(_COLOURS)], 4)
        outlines.rectangle(corners, outline=_COLOURS[number % len(_COLOURS)], width=line)
        cut.append(tile)
    whole.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return [_in_tile(whole), *cut]


def _corners(crop: Box, scale: float) -> tuple[float, float, float, float]:
    return crop.left * scale, crop.top * scale, (crop.left + crop.width) * scale, (crop.top + crop.height) * scale


def _within(corners: tuple[float, float, float, float], image: Image.Image) -> tuple[float, float, float, float]:
    return (
        max(0.0, corners[0]),
        max(0.0, corners[1]),
        min(float(image.width), corners[2]),
        min(float(image.height), corners[3]),
    )


def _tile_size(crop: Box) -> tuple[int, int]:
    scale = _TILE / max(crop.width, crop.height)
    return max(1, round(crop.width * scale)), max(1, round(crop.height * scale))


def _in_tile(image: Image.Image) -> Image.Image:
    tile = Image.new("RGB", (_TILE, _TILE), "#eeeeee")
    tile.paste(image, ((_TILE - image.width) // 2, (_TILE - image.height) // 2))
    return tile


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[: -max(1, len(text) // 20)]
    return text + "…"
