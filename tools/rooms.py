"""The picture of the rooms: ``python -m tools.rooms docs/images/rooms.svg`` draws the layers that imports go down.

Layers come from the import contract in ``pyproject.toml``, what a room is for from the first line of its docstring.
"""

import ast
import sys
from html import escape
from importlib import import_module
from pathlib import Path

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).parents[1]
_WIDTH, _GAP, _HEIGHT, _MARGIN = 980, 8, 64, 10
_LETTER_WIDTH = 6.1  # pixels, in the small text
_COLOURS = 'fill="#eef4fb" stroke="#9db8d6"'


def layers() -> list[list[str]]:
    """Return the rooms of the package, layer by layer from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return [[room.strip() for room in layer.split("|")] for layer in contracts[0]["layers"]]


def purpose(room: str) -> str:
    """Return the first sentence of a room's docstring."""
    path = ROOT / "lowmem_db" / room
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("``", "").split(". ")[0].rstrip(".")


def render() -> str:
    """Return the picture as SVG."""
    height = _MARGIN + len(layers()) * (_HEIGHT + _GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for row, rooms in enumerate(layers()):
        width = (_WIDTH - 2 * _MARGIN - _GAP * (len(rooms) - 1)) / len(rooms)
        for column, room in enumerate(rooms):
            parts += _box(room, _MARGIN + column * (width + _GAP), _MARGIN + row * (_HEIGHT + _GAP), width)
    text = "A room imports only from the layers below its own. make lint checks it."
    parts.append(f'<text x="{_MARGIN}" y="{height - 8}" font-size="12" fill="#57606a">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _box(room: str, left: float, top: float, width: float) -> list[str]:
    lines = _wrapped(purpose(room), int((width - 16) / _LETTER_WIDTH))[:3]
    return [
        f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{_HEIGHT}" rx="6" {_COLOURS}/>',
        f'<text x="{left + 8:.0f}" y="{top + 16}" font-size="13" font-weight="bold" fill="#1f2328">{room}</text>',
        *(
            f'<text x="{left + 8:.0f}" y="{top + 31 + 13 * number}" font-size="11" fill="#424a53">{escape(line)}</text>'
            for number, line in enumerate(lines)
        ),
    ]


def _wrapped(text: str, letters: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
