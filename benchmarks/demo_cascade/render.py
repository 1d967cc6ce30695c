"""Composes pictures of few nouns, and stores their pixels at 64 px with what each picture shows.

The pictures are simpler than the demo base's: one drawing in the middle, at most tinted, on a plain colour or in one of
four scenes. A model of this size, seen at 16 px, learns no more in minutes.
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.nouns import FLAT_STYLES
from benchmarks.demo_base.render import HUES, SHARD, Drawings, compose, load_drawings
from benchmarks.demo_base.scenes import PLAIN
from benchmarks.demo_cascade.parts import SIZES

NOUNS = {"dog face": "dog", "cat face": "cat", "clock": "clock", "car": "car", "flower": "flower", "apple": "apple"}
"""What is drawn, and what captions call it: of dogs and cats only faces, which are told apart at 16 px."""
SCENES = ("beach", "grass", "snow", "night")


def draw_attributes(noun: str, flat: bool, rng: random.Random) -> Attributes:
    """Chooses colour and background of one picture."""
    colour = rng.choice(list(HUES)) if rng.random() < 0.3 else None
    kind = rng.random()
    plain = [name for name in PLAIN if name not in ("white", colour)]
    background = "white" if kind < 0.3 else rng.choice(plain) if kind < 0.7 else rng.choice(SCENES)
    return Attributes(noun, flat, colour, background)


def draw(drawings: Drawings, noun: str, rng: random.Random) -> tuple[str, Attributes, Image.Image]:
    """Returns the drawing's key, what the picture shows, and the picture."""
    key, cutout = rng.choice(drawings.by_noun[noun])
    shown = draw_attributes(NOUNS[noun], key.split("/")[0] in FLAT_STYLES, rng)
    return key, shown, compose(cutout, shown, rng)


def render_shard(drawings: Drawings, rng: random.Random, target: Path, count: int = SHARD) -> None:
    """Writes one shard: pixels (count, 3, 64, 64) as .npy and what they show as .json."""
    drawn = [draw(drawings, noun, rng) for noun in rng.choices(drawings.nouns, drawings.weights, k=count)]
    size = (SIZES[2], SIZES[2])
    pixels = [np.asarray(picture.resize(size, Image.Resampling.LANCZOS)) for _, _, picture in drawn]
    target.with_suffix(".json").write_text(json.dumps([{"key": key, **asdict(shown)} for key, shown, _ in drawn]))
    np.save(target.with_suffix(".tmp.npy"), np.stack(pixels).transpose(0, 3, 1, 2))
    target.with_suffix(".tmp.npy").rename(target.with_suffix(".npy"))


def main() -> None:
    """Renders shards until the wanted number is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drawings", type=Path, required=True, help="folder with STYLE/SLUG.png cut-outs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=48, help=f"of {SHARD} pictures each")
    parser.add_argument("--nouns", nargs="+", default=list(NOUNS), help="only these")
    parser.add_argument("--seed", type=int, default=0, help="shard i is drawn from seed + i")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    drawings = Drawings([drawing for drawing in load_drawings(args.drawings) if drawing[1] in args.nouns])
    for index in range(args.shards):
        target = args.out / f"{index:04d}"
        if not target.with_suffix(".npy").exists():
            render_shard(drawings, random.Random(args.seed + index), target)


if __name__ == "__main__":
    main()
