"""Makes the pictures in ``subjects/``: composed views of held-out drawings, and smaller copies of photos.

    python -m benchmarks.quality.make_subjects DRAWINGS PHOTOS

DRAWINGS is what ``benchmarks.demo_base.fetch`` writes, PHOTOS is ``dataset/`` of github.com/google/dreambooth.
"""

import argparse
import random
from pathlib import Path

from PIL import Image

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.nouns import noun_of
from benchmarks.demo_base.render import SIZE, compose
from benchmarks.quality.subjects import BY_NAME, FOLDER, Subject

SLUGS = {
    "drawn_dog": "dog",
    "drawn_cat": "cat",
    "drawn_clock": "alarm-clock",
    "drawn_car": "automobile",
    "drawn_flower": "tulip",
    "drawn_backpack": "backpack",
    "drawn_shoe": "running-shoe",
    "drawn_cup": "hot-beverage",
    "drawn_house": "house",
    "drawn_fish": "blowfish",
    "drawn_hat": "graduation-cap",
    "drawn_bird": "rooster",
}
STYLE = "noto-v1"
VIEWS = ({}, {"background": "blue"}, {"background": "grass"}, {"background": "room", "size": "small"},
         {"background": "yellow", "size": "large"})  # fmt: skip
PHOTO_PIXELS = 256


def compose_views(subject: Subject, drawings: Path) -> None:
    """Write the views of a drawn subject."""
    key = f"{STYLE}/{SLUGS[subject.name]}"
    assert noun_of(key) is None, f"{key} was trained on"
    cutout = Image.open(drawings / f"{key}.png").convert("RGBA").resize((SIZE, SIZE))
    for number, view in enumerate(VIEWS):
        picture = compose(cutout, Attributes(subject.noun, **view), random.Random(number))
        picture.quantize(192, dither=Image.Dither.NONE).save(subject.folder / f"{number:02d}.png", optimize=True)


def shrink_photos(subject: Subject, photos: Path) -> None:
    """Write smaller copies of the first photos of a subject."""
    for path in sorted((photos / subject.name).glob("*.jpg"))[: len(VIEWS)]:
        photo = Image.open(path).convert("RGB")
        photo.thumbnail((PHOTO_PIXELS, PHOTO_PIXELS), Image.Resampling.LANCZOS)
        photo.save(subject.folder / path.name, quality=88)


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), help="only these")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for subject in (BY_NAME[name] for name in arguments.only):
        subject.folder.mkdir(exist_ok=True)
        if subject.kind == "drawn":
            compose_views(subject, arguments.drawings)
        else:
            shrink_photos(subject, arguments.photos)


if __name__ == "__main__":
    main()
