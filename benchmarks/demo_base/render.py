"""Composes pictures from cut-out drawings and stores their latents with what each picture shows."""

import argparse
import json
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.nouns import FLAT_STYLES, NOUNS, ONE_SIDED, noun_of
from benchmarks.demo_base.scenes import PLAIN, SCENES, paint_background
from lowmem_db.models.autoencoder_taef2 import AutoencoderTAEF2

SIZE = 128
HUES = {"red": 0, "orange": 18, "yellow": 34, "green": 85, "blue": 155, "purple": 195, "pink": 228}  # of 256
SHARD = 256


def tint(cutout: Image.Image, colour: str) -> Image.Image:
    """Returns the RGBA cut-out with every hue set to the colour; light and dark stay as they were."""
    hue, saturation, value = (np.asarray(part) for part in cutout.convert("RGB").convert("HSV").split())
    strong = np.where(value < 60, saturation, np.maximum(saturation, 150 if colour != "pink" else 100))
    bright = np.maximum(value, np.where(value < 60, 0, 130)).clip(0, 245)
    merged = np.stack([np.full_like(hue, HUES[colour]), strong.astype(np.uint8), bright.astype(np.uint8)], -1)
    tinted = Image.fromarray(merged, "HSV").convert("RGB")
    tinted.putalpha(cutout.getchannel("A"))
    return tinted


def draw_attributes(noun: str, flat: bool, rng: random.Random) -> Attributes:
    """Chooses colour, background, position and size of one picture."""
    colour = rng.choice(list(HUES)) if rng.random() < 0.25 else None
    kind = rng.random()
    plain = [name for name in PLAIN if name not in ("white", colour)]
    background = "white" if kind < 0.42 else rng.choice(plain) if kind < 0.72 else rng.choice(list(SCENES))
    placed = rng.random()
    position = rng.choice(("left", "right")) if placed < 0.12 else None
    if 0.12 <= placed < 0.16 and background in PLAIN:
        position = rng.choice(("top", "bottom"))
    sized = rng.random()
    size = "small" if position or sized < 0.08 else "large" if sized > 0.94 else None
    return Attributes(noun, flat, colour, background, position, size)


def place(shown: Attributes, side: int, rng: random.Random) -> tuple[int, int]:
    """Returns the top left corner in pixels of a drawing with the given side."""
    free = SIZE - side
    x = {"left": 0.06, "right": 0.94}.get(shown.position or "", 0.5) * free + rng.uniform(-3, 3)
    y = {"top": 0.06, "bottom": 0.94}.get(shown.position or "", 0.5) * free + rng.uniform(-3, 3)
    if shown.background in SCENES:
        y = free * rng.uniform(0.75, 0.95)
    return round(x), round(y)


def compose(cutout: Image.Image, shown: Attributes, rng: random.Random) -> Image.Image:
    """Returns the RGB picture of (SIZE, SIZE) pixels that shows the cut-out as described."""
    low, high = {"small": (0.45, 0.55), "large": (0.95, 1.0), None: (0.74, 0.9)}[shown.size]
    side = round(SIZE * rng.uniform(low, high))
    drawing = tint(cutout, shown.colour) if shown.colour else cutout
    if shown.noun not in ONE_SIDED and rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = drawing.resize((side, side), Image.Resampling.LANCZOS)
    canvas = paint_background(shown.background, SIZE, rng)
    canvas.paste(drawing, place(shown, side, rng), drawing)
    return canvas


def load_drawings(folder: Path) -> list[tuple[str, str, Image.Image]]:
    """Returns (key, noun, RGBA cut-out) of the drawings `folder/style/slug.png` that are trained on."""
    drawings = []
    for path in sorted(folder.glob("*/*.png")):
        key = f"{path.parent.name}/{path.stem}"
        if noun := noun_of(key):
            drawings.append((key, noun, Image.open(path).convert("RGBA").resize((SIZE, SIZE))))
    return drawings


@torch.no_grad()
def encode(vae: AutoencoderTAEF2, pictures: list[Image.Image]) -> np.ndarray:
    """Returns the latents (batch, 32, 16, 16) of the pictures in half precision."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    return vae.encode(pixels.float() / 127.5 - 1).latents.half().numpy()


def render_shard(drawings: list, vae: AutoencoderTAEF2, rng: random.Random, target: Path) -> None:
    """Writes one shard: SHARD latents as .npy and what they show as .json."""
    nouns = sorted({noun for _, noun, _ in drawings})
    shown, pictures, keys = [], [], []
    by_noun = {noun: [drawing for drawing in drawings if drawing[1] == noun] for noun in nouns}
    weights = [len(by_noun[noun]) ** 0.7 for noun in nouns]
    for noun in rng.choices(nouns, weights, k=SHARD):
        key, _, cutout = rng.choice(by_noun[noun])
        shown.append(draw_attributes(noun, key.split("/")[0] in FLAT_STYLES, rng))
        pictures.append(compose(cutout, shown[-1], rng))
        keys.append(key)
    latents = np.concatenate([encode(vae, pictures[start : start + 32]) for start in range(0, SHARD, 32)])
    records = [{"key": key, **asdict(attributes)} for key, attributes in zip(keys, shown, strict=True)]
    target.with_suffix(".json").write_text(json.dumps(records))
    np.save(target.with_suffix(".tmp.npy"), latents)
    target.with_suffix(".tmp.npy").rename(target.with_suffix(".npy"))


def main() -> None:
    """Renders shards until the wanted number is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drawings", type=Path, required=True, help="folder with STYLE/SLUG.png cut-outs")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the AutoencoderTAEF2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=48, help=f"of {SHARD} pictures each")
    parser.add_argument("--first", type=int, default=0, help="number of the first shard")
    parser.add_argument("--nouns", nargs="+", default=list(NOUNS), help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="shard i is drawn from seed + i")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderTAEF2.from_pretrained(args.vae, torch_dtype=torch.float32).eval()
    drawings = [drawing for drawing in load_drawings(args.drawings) if drawing[1] in args.nouns]
    print(f"{len(drawings)} drawings", flush=True)
    for index in range(args.first, args.first + args.shards):
        target = args.out / f"{index:04d}"
        if not target.with_suffix(".npy").exists():
            start = time.perf_counter()
            render_shard(drawings, vae, random.Random(args.seed + index), target)
            print(f"shard {index}: {SHARD / (time.perf_counter() - start):.1f} pictures/s", flush=True)


if __name__ == "__main__":
    main()
