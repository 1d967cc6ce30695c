"""Fetches the drawings from npm and rasterises them to STYLE/SLUG.png (needs npm, and resvg-py from PyPI)."""

import argparse
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from benchmarks.demo_base.nouns import CLASSIFIER_STYLE, HELD_OUT, NOUNS, STYLES, noun_of, noun_of_slug

SIZE = 128
VERSIONS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "fxemoji": "1.2.2",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "twemoji": "1.2.5",
    "emojione": "1.2.3",
    CLASSIFIER_STYLE: "1.2.4",
}
OTHER_NAMES = {
    "black-bird": ("blackbird",),
    "woman-s-hat": ("womanshat",),
    "man-s-shoe": ("mensshoe", "mans-shoe"),
    "backpack": ("school-backpack",),
    **{animal: (f"{animal}-face",) for animal in ("bear", "fox", "frog", "lion", "panda", "robot")},
}


def is_wanted(key: str) -> bool:
    """Returns whether the drawing `style/slug` is trained on, held out, or for the classifier alone."""
    style, slug = key.split("/")
    return noun_of(key) is not None or key in HELD_OUT or (style == CLASSIFIER_STYLE and bool(noun_of_slug(slug)))


def fetch_icons(style: str) -> dict:
    """Returns the icon set `@iconify-json/STYLE` as published on npm."""
    command = ["npm", "pack", "--silent", f"@iconify-json/{style}@{VERSIONS[style]}"]
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(Path(folder, packed.stdout.split()[-1])) as archive:
            member = archive.extractfile("package/icons.json")
            if member is None:
                raise FileNotFoundError(f"@iconify-json/{style} holds no icons.json")
            return json.load(member)


def find_icons(icons: dict, slug: str) -> list[str]:
    """Returns the names under which an icon set holds a drawing, several where it numbers its designs.

    Sets spell apostrophes and spaces differently.
    """
    plain = slug.replace("-s-", "s-").replace("o-clock", "oclock")
    squeezed = plain.replace("-", "")
    names = list(dict.fromkeys((slug, plain, squeezed, *OTHER_NAMES.get(slug, ()))))
    found = [name for name in names if name in icons["icons"]]
    numbered = [f"{name}-{number}" for name in names for number in range(1, 4)]
    return found[:1] or [name for name in numbered if name in icons["icons"]]


def rasterise(icons: dict, name: str) -> bytes:
    """Returns one icon as a PNG of SIZE x SIZE pixels with transparency."""
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, default)) for key, default in (("left", 0), ("top", 0))]
    box += [icon.get(key, icons.get(key, 16)) for key in ("width", "height")]
    view = " ".join(str(value) for value in box)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view}">'
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg + icon["body"] + "</svg>", width=SIZE, height=SIZE))


def main() -> None:
    """Fetches every style and writes the drawings that are trained on or held out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--styles", nargs="+", default=(*STYLES, CLASSIFIER_STYLE))
    args = parser.parse_args()
    slugs = sorted({slug for group in NOUNS.values() for slug in group})
    for style in args.styles:
        icons, folder = fetch_icons(style), args.out / style
        folder.mkdir(parents=True, exist_ok=True)
        for slug in slugs:
            names = find_icons(icons, slug) if is_wanted(f"{style}/{slug}") else []
            for number, name in enumerate(names, start=1):
                target = folder / (f"{slug}.png" if number == 1 else f"{slug}_{number}.png")
                target.write_bytes(rasterise(icons, name))
        print(f"{style}: {len(list(folder.glob('*.png')))} drawings", flush=True)


if __name__ == "__main__":
    main()
