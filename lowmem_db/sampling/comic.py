"""A comic with one character, as in figure 18 of arXiv:2208.12242: a script of panels, and the words in them.

The model draws the pictures; the words are drawn here, because no model of this size can write.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from lowmem_db.config.yaml_text import YamlError, parse_yaml, read_text
from lowmem_db.errors import DataError

COMIC_FILE = "comic.png"
PAGE_FILE = "comic.html"
_EXAMPLE = "panels: [{prompt: 'a {identifier} {class_noun} in bed', words: 'Time to eat!'}]"
_LEAST_WIDTH = 384
_GAP = 12
_LARGEST, _SMALLEST = 1 / 14, 1 / 26
"""Sizes of the letters, as shares of the width of a panel."""
_NO_CHARACTER = "\U0010ffff"
Font = ImageFont.FreeTypeFont


class Panel(BaseModel):
    """One panel of a comic."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    """What is drawn; ``{identifier}`` and ``{class_noun}`` stand for those of the run."""
    words: str = Field(default="", max_length=300)
    """What is said, in a speech balloon."""
    caption: str = Field(default="", max_length=300)
    """What is told, below the picture."""
    image: int = Field(default=0, ge=0, le=999)
    """Which of the images of the prompt is shown, from zero."""


class Script(BaseModel):
    """A comic."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    title: str = Field(default="", max_length=100)
    """What stands above the panels."""
    columns: int = Field(default=2, ge=1, le=6)
    """Panels in a row."""
    font: str | None = None
    """A font file, seen from the folder of the script, or one of the system, such as ``arial.ttf``. Default: Pillow's
    own, which has the letters of English."""
    panels: list[Panel] = Field(min_length=1, max_length=100)
    """The panels, in order."""


def read_script(path: Path) -> Script:
    """Read and check a script, and its font.

    Raises:
        DataError: The file cannot be read, a field is wrong, or the font does not have the letters of the words.
    """
    try:
        tree = parse_yaml(read_text(path))
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(f"--comic: {path}: {reason}; allowed: a YAML file with panels") from error
    except (ValueError, YamlError) as error:
        raise DataError(f"--comic: {path}: cannot be read as YAML ({error}); allowed: {_EXAMPLE}") from error
    if not isinstance(tree, dict):
        raise DataError(f"--comic: {path}: is not a script of panels; allowed: {_EXAMPLE}")
    try:
        script = Script.model_validate(tree)
    except ValidationError as error:
        raise DataError("\n".join(_problem(path, each) for each in error.errors())) from error
    if script.font is not None:
        beside = path.parent / Path(script.font).expanduser()
        script = script.model_copy(update={"font": str(beside) if beside.is_file() else script.font})
    _check_letters(path, script)
    return script


def draw_panels(script: Script, pictures: Sequence[Sequence[Image.Image]]) -> list[Image.Image]:
    """Return each panel with its words, all of one width.

    Args:
        script: The script.
        pictures: The images of each panel's prompt.
    """
    return [_panel(script, panel, images[panel.image]) for panel, images in zip(script.panels, pictures, strict=True)]


def compose(script: Script, panels: Sequence[Image.Image]) -> Image.Image:
    """Return the whole comic: the title, and the panels in rows."""
    columns = min(script.columns, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    width = columns * (panels[0].width + _GAP) + _GAP
    title = _lines_of(script.title, script, width - 2 * _GAP, panels[0].width, bold=True) if script.title else None
    top = _GAP + (title.height if title else 0)
    sheet = Image.new("RGB", (width, top + sum(max(p.height for p in row) + _GAP for row in rows)), "white")
    if title:
        sheet.paste(title, (_GAP, _GAP // 2))
    for row in rows:
        for column, panel in enumerate(row):
            sheet.paste(panel, (_GAP + column * (panel.width + _GAP), top))
        top += max(panel.height for panel in row) + _GAP
    return sheet


def _panel(script: Script, panel: Panel, image: Image.Image) -> Image.Image:
    picture = _framed(_large_enough(image.convert("RGB")))
    parts = [picture]
    if panel.words:
        balloon = _balloon(panel.words, script, picture.width)
        if balloon.height <= picture.height // 3:
            picture.paste(balloon, (picture.width // 24, picture.height // 24), balloon)
        else:  # it would hide the picture
            parts.insert(0, _on_white(balloon, picture.width))
    if panel.caption:
        parts.append(_lines_of(panel.caption, script, picture.width, picture.width))
    whole = Image.new("RGB", (picture.width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def _large_enough(image: Image.Image) -> Image.Image:
    factor = -(-_LEAST_WIDTH // image.width)
    if factor == 1:
        return image.copy()
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.LANCZOS)


def _framed(picture: Image.Image) -> Image.Image:
    ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline="black", width=3)
    return picture


def _balloon(words: str, script: Script, width: int) -> Image.Image:
    """Return a speech balloon with transparency: the words in a rounded box, and its tail."""
    inside = width * 5 // 6
    font, lines = _largest_fitting(words, script, inside, width)
    pad, line = width // 32, _line_height(font)
    text_width = max(int(font.getlength(text)) for text in lines)
    box = (0, 0, text_width + 2 * pad, len(lines) * line + 2 * pad)
    tail = width // 16
    balloon = Image.new("RGBA", (box[2] + 1, box[3] + tail + 1))
    draw = ImageDraw.Draw(balloon)
    outline = max(2, width // 200)
    draw.rounded_rectangle(box, radius=pad, fill="white", outline="black", width=outline)
    left = min(box[2] // 4, box[2] - tail)
    draw.polygon([(left, box[3]), (left + tail, box[3] + tail), (left + tail, box[3])], fill="black")
    inset = (left + outline, box[3] - outline), (left + tail - outline, box[3] + tail - 2 * outline)
    draw.polygon([inset[0], inset[1], (inset[1][0], inset[0][1])], fill="white")
    for number, text in enumerate(lines):
        draw.text((pad, pad + number * line), text, fill="black", font=font)
    return balloon


def _on_white(balloon: Image.Image, width: int) -> Image.Image:
    strip = Image.new("RGB", (width, balloon.height + width // 32), "white")
    strip.paste(balloon, (width // 24, width // 64), balloon)
    return strip


def _lines_of(text: str, script: Script, width: int, panel_width: int, *, bold: bool = False) -> Image.Image:
    """Return lines of text on white."""
    font = _font(script, round(panel_width * (_LARGEST if bold else (_LARGEST + _SMALLEST) / 2)))
    pad, line = panel_width // 48, _line_height(font)
    lines = _wrapped(text, font, width - 2 * pad)
    strip = Image.new("RGB", (width, len(lines) * line + 2 * pad), "white")
    draw = ImageDraw.Draw(strip)
    for number, each in enumerate(lines):
        draw.text((pad, pad + number * line), each, fill="black", font=font, stroke_width=int(bold))
    return strip


def _largest_fitting(words: str, script: Script, width: int, panel_width: int) -> tuple[Font, list[str]]:
    """Return the largest font in which the words take at most three lines, or the smallest."""
    smallest, largest = round(panel_width * _SMALLEST), round(panel_width * _LARGEST)
    for size in range(largest, smallest, -1):
        font = _font(script, size)
        lines = _wrapped(words, font, width)
        if len(lines) <= 3:
            return font, lines
    font = _font(script, smallest)
    return font, _wrapped(words, font, width)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.strip().splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") <= width:
                line = f"{line} {word}"
                continue
            if line:
                lines.append(line)
            *full, line = _pieces(word, font, width)
            lines += full
        lines.append(line)
    return lines or [""]


def _pieces(word: str, font: Font, width: int) -> list[str]:
    """Cut a word that is wider than a line."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _line_height(font: Font) -> int:
    return sum(font.getmetrics())


def _font(script: Script, size: int) -> Font:
    font = ImageFont.truetype(script.font, size) if script.font else ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _check_letters(path: Path, script: Script) -> None:
    try:
        font = _font(script, 20)
    except OSError as error:
        raise DataError(
            f"--comic: {path}: font: {script.font} cannot be read as a font ({error}); allowed: a TTF or OTF file, "
            "seen from the folder of the script, or the name of one of the system, such as DejaVuSans.ttf"
        ) from error
    texts = [script.title, *(text for panel in script.panels for text in (panel.words, panel.caption))]
    no_letters = (_shape(font, _NO_CHARACTER), _shape(font, " "))
    missing = [
        letter
        for letter in dict.fromkeys("".join(texts))
        if not letter.isspace() and _shape(font, letter) in no_letters
    ]
    if missing:
        named = "Pillow's own font" if script.font is None else script.font
        raise DataError(
            f"--comic: {path}: {named} has no {' '.join(map(ascii, missing[:8]))}; name one that has, in the script: "
            "font: DejaVuSans.ttf, or arial.ttf on Windows and macOS"
        )


def _shape(font: Font, letter: str) -> bytes:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((4, 4), letter, fill="white", font=font)
    return image.tobytes()


def _problem(path: Path, error: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    fields = Panel.model_fields if place.startswith("panels[") else Script.model_fields
    reasons = {
        "extra_forbidden": f"is no field; allowed: {', '.join(fields)}",
        "missing": f"is missing; allowed: {_EXAMPLE}",
        "model_type": f"{error['input']!r} is no panel; allowed: {{prompt: 'a dog', words: 'Time to eat!'}}",
        "list_type": f"{error['input']!r} is no list of panels; allowed: {_EXAMPLE}",
        "too_short": f"is empty; allowed: {_EXAMPLE}",
        "string_too_short": "is empty; write what is drawn",
        "string_type": f"{error['input']!r} is no text; write it in quotes",
    }
    reason = reasons.get(error["type"], f"{str(error['input'])[:40]!r}: {error['msg'][0].lower()}{error['msg'][1:]}")
    return f"--comic: {path}: {place}: {reason}"
