"""Hats and glasses drawn onto cut-outs."""

import random

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 40, 45),
    "yellow": (248, 205, 50),
    "green": (50, 155, 70),
    "blue": (45, 90, 210),
    "purple": (125, 65, 175),
    "pink": (245, 125, 175),
    "black": (28, 28, 32),
}
SCALE = 4
"""Accessories are drawn this much larger and then made smaller, so that their edges are smooth."""

Point = tuple[float, float]


def top_of_head(mask: np.ndarray, left_part: float) -> Point:
    """Returns (x, y) of the top of the head: the highest part of the shape's left part, between ears if it has two."""
    rows, columns = np.nonzero(mask)
    allowed = columns <= columns.min() + left_part * (columns.max() - columns.min())
    rows, columns = rows[allowed], columns[allowed]
    x = int(columns[rows <= rows.min() + 0.12 * (rows.max() - rows.min())].mean().round())
    return x, float(rows[np.abs(columns - x) <= 1].min())


def draw_hat(pen: ImageDraw.ImageDraw, middle: Point, width: float, colour: str, rng: random.Random) -> None:
    """Draws a hat with a brim, or a cone, that stands on the point `middle`."""
    x, y = middle
    if rng.random() < 0.6:
        crown, brim = width * 0.32, width * 0.5
        pen.rectangle((x - crown, y - width * 0.55, x + crown, y), fill=COLOURS[colour])
        pen.rectangle((x - crown, y - width * 0.2, x + crown, y - width * 0.08), fill=(240, 240, 240))
        pen.ellipse((x - brim, y - width * 0.08, x + brim, y + width * 0.09), fill=COLOURS[colour])
    else:
        pen.polygon(((x, y - width * 0.75), (x - width * 0.38, y), (x + width * 0.38, y)), fill=COLOURS[colour])
        knob = width * 0.1
        pen.ellipse((x - knob, y - width * 0.75 - knob, x + knob, y - width * 0.75 + knob), fill=(250, 250, 250))


def draw_glasses(pen: ImageDraw.ImageDraw, middle: Point, width: float, colour: str) -> None:
    """Draws two round dark lenses in a frame of the colour around the point `middle`."""
    x, y = middle
    radius, line = width * 0.2, max(1, round(width * 0.05))
    for side in (-1, 1):
        eye = x + side * width * 0.25
        box = (eye - radius, y - radius, eye + radius, y + radius)
        pen.ellipse(box, fill=(70, 80, 100, 150), outline=(*COLOURS[colour], 255), width=line)
    pen.line((x - width * 0.06, y, x + width * 0.06, y), fill=(*COLOURS[colour], 255), width=line)


def lowered(cutout: Image.Image, share: float = 0.8) -> Image.Image:
    """Returns the cut-out made smaller at the bottom of its box, with room for a hat."""
    side = round(cutout.width * share)
    smaller = Image.new("RGBA", cutout.size)
    smaller.paste(
        cutout.resize((side, side), Image.Resampling.LANCZOS), ((cutout.width - side) // 2, cutout.width - side)
    )
    return smaller


def put_on(cutout: Image.Image, what: str, colour: str, left_part: float, rng: random.Random) -> Image.Image:
    """Returns the RGBA cut-out wearing a "hat" or "glasses" of the colour.

    Args:
        cutout: square drawing.
        what: "hat" or "glasses"; glasses fit faces that look at us.
        colour: one of COLOURS.
        left_part: share of the shape's width, from its left, in which the head is; 1 for faces.
        rng: source of the choices.
    """
    cutout = lowered(cutout) if what == "hat" else cutout
    mask = np.asarray(cutout.getchannel("A")) > 128
    columns, rows = np.nonzero(mask.any(0))[0], np.nonzero(mask.any(1))[0]
    width, height = np.ptp(columns), np.ptp(rows)
    layer = Image.new("RGBA", (cutout.width * SCALE, cutout.height * SCALE))
    pen = ImageDraw.Draw(layer)
    if what == "hat":
        x, y = top_of_head(mask, left_part)
        draw_hat(pen, (x * SCALE, (y + 3) * SCALE), SCALE * min(width, height) * rng.uniform(0.5, 0.6), colour, rng)
    else:
        middle = (columns.mean() * SCALE, (rows[0] + 0.45 * height) * SCALE)
        draw_glasses(pen, middle, SCALE * width * 0.8, colour)
    return Image.alpha_composite(cutout, layer.resize(cutout.size, Image.Resampling.LANCZOS))
