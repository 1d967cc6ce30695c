"""Composes pictures as for the demo base, and stores their pixels at 64 px with what each picture shows."""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.demo_base.render import SHARD, Drawings, load_drawings
from benchmarks.demo_cascade.parts import SIZES


def render_shard(drawings: Drawings, rng: random.Random, target: Path, count: int = SHARD) -> None:
    """Writes one shard: pixels (count, 3, 64, 64) as .npy and what they show as .json."""
    drawn = [drawings.draw(noun, rng) for noun in rng.choices(drawings.nouns, drawings.weights, k=count)]
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
    parser.add_argument("--seed", type=int, default=0, help="shard i is drawn from seed + i")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    drawings = Drawings(load_drawings(args.drawings))
    for index in range(args.shards):
        target = args.out / f"{index:04d}"
        if not target.with_suffix(".npy").exists():
            render_shard(drawings, random.Random(args.seed + index), target)


if __name__ == "__main__":
    main()
