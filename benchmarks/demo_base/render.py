"""Composes pictures from cut-out drawings and stores their latents with what each picture shows."""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.demo_base.accessories import COLOURS, put_on
from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.finish import PHOTO, STYLES, light_from_a_side, shadow_of, vary_colours
from benchmarks.demo_base.nouns import FACES, FLAT_STYLES, NOUNS, ONE_SIDED, WEARERS, noun_of
from benchmarks.demo_base.scenes import CLUTTER, PLAIN, SCENES, paint_background
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
    colour = rng.choice(list(HUES)) if rng.random() < 0.3 else None
    kind = rng.random()
    plain = [name for name in PLAIN if name not in ("white", colour)]
    background = "white" if kind < 0.36 else rng.choice(plain) if kind < 0.66 else rng.choice(list(SCENES))
    placed = rng.random()
    position = rng.choice(("left", "right")) if placed < 0.15 else None
    if 0.15 <= placed < 0.2 and background in PLAIN:
        position = rng.choice(("top", "bottom"))
    sized = rng.random()
    size = "small" if position or sized < 0.08 else "large" if sized > 0.94 else None
    return Attributes(noun, flat, colour, background, position, size)


def add_extras(shown: Attributes, nouns: Sequence[str], rng: random.Random) -> Attributes:
    """Gives some pictures a second subject, a hat or glasses, or a style with a name."""
    if rng.random() < 0.1:
        second_colour = rng.choice([name for name in HUES if name != shown.background]) if rng.random() < 0.3 else None
        shown = replace(shown, position=None, size=None, second=rng.choice(nouns), second_colour=second_colour)
    elif shown.noun in WEARERS and rng.random() < 0.2:
        wearing = rng.choice(("hat", "glasses")) if shown.noun in FACES else "hat"
        colour = rng.choice([name for name in COLOURS if name not in (shown.background, shown.colour)])
        shown = replace(shown, wearing=wearing, wearing_colour=colour)
    return add_style(shown, rng) if rng.random() < 0.16 else shown


def add_style(shown: Attributes, rng: random.Random) -> Attributes:
    """Gives the picture a style; grey ones show no colour, and half of the photos have clutter behind the subject."""
    style = PHOTO if rng.random() < 0.5 else rng.choice([name for name in STYLES if name != PHOTO])
    background = CLUTTER if style == PHOTO and rng.random() < 0.5 else shown.background
    if style not in ("sketch", "black and white"):
        return replace(shown, style=style, background=background)
    background = "white" if background in PLAIN else background
    return replace(shown, style=style, background=background, colour=None, second_colour=None, wearing=None)


def place(shown: Attributes, side: int, rng: random.Random) -> tuple[int, int]:
    """Returns the top left corner in pixels of a drawing with the given side."""
    free = SIZE - side
    x = {"left": 0.06, "right": 0.94}.get(shown.position or "", 0.5) * free + rng.uniform(-3, 3)
    y = {"top": 0.06, "bottom": 0.94}.get(shown.position or "", 0.5) * free + rng.uniform(-3, 3)
    if shown.background in SCENES and shown.background != "space":
        y = free * rng.uniform(0.75, 0.95)
    return round(x), round(y)


def prepare(cutout: Image.Image, shown: Attributes, rng: random.Random) -> Image.Image:
    """Returns the RGBA cut-out in its colour, with what it wears, mirrored and lit."""
    drawing = tint(cutout, shown.colour) if shown.colour else cutout
    if shown.wearing:
        left_part = 0.5 if shown.noun in ONE_SIDED else 1.0
        drawing = put_on(drawing, shown.wearing, str(shown.wearing_colour), left_part, rng)
    if shown.noun not in ONE_SIDED and rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return light_from_a_side(drawing, rng) if shown.style == PHOTO else drawing


def paste(canvas: Image.Image, drawing: Image.Image, shown: Attributes, rng: random.Random) -> None:
    """Puts a prepared cut-out onto the background at the size and place that are described."""
    low, high = {"small": (0.45, 0.55), "large": (0.95, 1.0), None: (0.74, 0.9)}[shown.size]
    side = round(SIZE * rng.uniform(low, high))
    drawing = drawing.resize((side, side), Image.Resampling.LANCZOS)
    x, y = place(shown, side, rng)
    if shown.style == PHOTO:
        canvas.paste((0, 0, 0), (x, y + 3), shadow_of(drawing, rng))
    canvas.paste(drawing, (x, y), drawing)


def compose(
    cutout: Image.Image, shown: Attributes, rng: random.Random, second: Image.Image | None = None
) -> Image.Image:
    """Returns the RGB picture of (SIZE, SIZE) pixels that shows the cut-outs as described."""
    drawing = prepare(cutout, shown, rng)
    canvas = paint_background(shown.background, SIZE, rng)
    if second is None:
        paste(canvas, drawing, shown, rng)
    else:
        right = replace(shown, noun=str(shown.second), colour=shown.second_colour, wearing=None)
        paste(canvas, drawing, replace(shown, position="left", size="small"), rng)
        paste(canvas, prepare(second, right, rng), replace(right, position="right", size="small"), rng)
    return STYLES[shown.style](canvas, rng) if shown.style else canvas


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
    """Returns the latents (batch, 32, 16, 16) of the pictures in half precision, computed in bfloat16."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        return vae.encode(pixels.float() / 127.5 - 1).latents.half().numpy()


class Drawings:
    """Cut-outs by noun, and pictures composed of them."""

    def __init__(self, drawings: list[tuple[str, str, Image.Image]]) -> None:
        self.by_noun: dict[str, list[tuple[str, Image.Image]]] = {}
        for key, noun, cutout in drawings:
            self.by_noun.setdefault(noun, []).append((key, cutout))
        self.nouns = sorted(self.by_noun)
        self.weights = [len(self.by_noun[noun]) ** 0.7 for noun in self.nouns]

    def draw(self, noun: str, rng: random.Random) -> tuple[str, Attributes, Image.Image]:
        """Returns the drawing's key, what the picture shows, and the picture."""
        key, cutout = rng.choice(self.by_noun[noun])
        shown = draw_attributes(noun, key.split("/")[0] in FLAT_STYLES, rng)
        shown = add_extras(shown, self.nouns, rng)
        cutout = vary_colours(cutout, rng) if rng.random() < 0.5 else cutout
        second = rng.choice(self.by_noun[shown.second])[1] if shown.second else None
        return key, shown, compose(cutout, shown, rng, second)


def render_shard(drawings: Drawings, vae: AutoencoderTAEF2, rng: random.Random, target: Path) -> None:
    """Writes one shard: SHARD latents as .npy and what they show as .json."""
    drawn = [drawings.draw(noun, rng) for noun in rng.choices(drawings.nouns, drawings.weights, k=SHARD)]
    pictures = [picture for _, _, picture in drawn]
    latents = np.concatenate([encode(vae, pictures[start : start + 32]) for start in range(0, SHARD, 32)])
    target.with_suffix(".json").write_text(json.dumps([{"key": key, **asdict(shown)} for key, shown, _ in drawn]))
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
    wanted = [drawing for drawing in load_drawings(args.drawings) if drawing[1] in args.nouns]
    drawings = Drawings(wanted)
    print(f"{len(wanted)} drawings of {len(drawings.nouns)} nouns", flush=True)
    for index in range(args.first, args.first + args.shards):
        target = args.out / f"{index:04d}"
        if not target.with_suffix(".npy").exists():
            start = time.perf_counter()
            render_shard(drawings, vae, random.Random(args.seed + index), target)
            print(f"shard {index}: {SHARD / (time.perf_counter() - start):.1f} pictures/s", flush=True)


if __name__ == "__main__":
    main()
