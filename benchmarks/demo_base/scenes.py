"""Backgrounds drawn with Pillow: plain colours and simple scenes."""

import random

from PIL import Image, ImageDraw

from benchmarks.demo_base.finish import clutter

Colour = tuple[int, int, int]

CLUTTER = "clutter"
"""A blurred jumble behind the subject of a photo, which no caption names."""

PLAIN: dict[str, Colour] = {
    "white": (255, 255, 255),
    "blue": (58, 92, 205),
    "yellow": (250, 214, 70),
    "green": (70, 165, 80),
    "red": (205, 50, 50),
    "pink": (250, 175, 200),
    "purple": (130, 80, 170),
    "orange": (245, 145, 50),
    "gray": (150, 150, 150),
    "black": (22, 22, 24),
}


def jitter(colour: Colour, rng: random.Random, amount: int = 10) -> Colour:
    """Returns the colour with each component moved at random by up to `amount`."""
    red, green, blue = (min(255, max(0, part + rng.randint(-amount, amount))) for part in colour)
    return red, green, blue


def ground(
    canvas: Image.Image, rng: random.Random, sky: Colour, land: Colour, horizon: float = 0.6
) -> ImageDraw.ImageDraw:
    """Paints sky above and land below the horizon (a fraction of the height)."""
    width, height = canvas.size
    pen = ImageDraw.Draw(canvas)
    line = int(height * (horizon + rng.uniform(-0.04, 0.04)))
    pen.rectangle((0, 0, width, line), fill=jitter(sky, rng))
    pen.rectangle((0, line, width, height), fill=jitter(land, rng))
    return pen


def beach(canvas: Image.Image, rng: random.Random) -> None:
    """Sky, a strip of sea, sand and often a sun."""
    width, height = canvas.size
    pen = ground(canvas, rng, (150, 210, 245), (240, 214, 150), 0.62)
    sea = int(height * rng.uniform(0.42, 0.48))
    pen.rectangle((0, sea, width, int(height * 0.62)), fill=jitter((40, 130, 200), rng))
    if rng.random() < 0.6:
        x, radius = rng.choice((0.14, 0.86)) * width, 0.08 * width
        pen.ellipse((x - radius, 0.06 * height, x + radius, 0.06 * height + 2 * radius), fill=(255, 225, 90))


def grass(canvas: Image.Image, rng: random.Random) -> None:
    """Blue sky over a green meadow."""
    ground(canvas, rng, (165, 215, 250), (110, 185, 75), 0.58)


def snow(canvas: Image.Image, rng: random.Random) -> None:
    """White land under a pale sky with flakes."""
    width, height = canvas.size
    pen = ground(canvas, rng, (150, 180, 215), (240, 245, 252), 0.56)
    for _ in range(14):
        x, y = rng.uniform(0, width), rng.uniform(0, height * 0.55)
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(255, 255, 255))


def forest(canvas: Image.Image, rng: random.Random) -> None:
    """Dark firs behind a green ground."""
    width, height = canvas.size
    pen = ground(canvas, rng, (175, 215, 195), (95, 140, 70), 0.66)
    for column in range(6):
        x = width * (column + rng.uniform(0.2, 0.8)) / 6
        top, half = height * rng.uniform(0.02, 0.2), width * rng.uniform(0.1, 0.14)
        pen.polygon(
            ((x, top), (x - half, height * 0.68), (x + half, height * 0.68)), fill=jitter((30, 95, 55), rng, 14)
        )


def city(canvas: Image.Image, rng: random.Random) -> None:
    """Gray houses with windows behind a street."""
    width, height = canvas.size
    pen = ground(canvas, rng, (190, 215, 235), (105, 105, 112), 0.7)
    for column in range(4):
        left, top = width * column / 4, height * rng.uniform(0.08, 0.32)
        pen.rectangle((left, top, left + width / 4 - 3, height * 0.7), fill=jitter((140, 135, 150), rng, 20))
        for row in range(3):
            y = top + 8 + row * 14
            for offset in (6, 18):
                pen.rectangle((left + offset, y, left + offset + 6, y + 7), fill=(250, 235, 160))


def night(canvas: Image.Image, rng: random.Random) -> None:
    """A dark blue sky with stars and a moon over dark land."""
    width, height = canvas.size
    pen = ground(canvas, rng, (20, 26, 70), (32, 48, 52), 0.72)
    for _ in range(16):
        x, y = rng.uniform(0, width), rng.uniform(0, height * 0.65)
        pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=(250, 250, 215))
    x = width * rng.choice((0.13, 0.87))
    pen.ellipse((x - 10, 8, x + 10, 28), fill=(250, 240, 190))


def room(canvas: Image.Image, rng: random.Random) -> None:
    """A light wall over a floor of wooden boards."""
    width, height = canvas.size
    pen = ground(canvas, rng, (236, 226, 208), (176, 122, 74), 0.62)
    for row in range(4):
        y = height * (0.69 + 0.08 * row)
        pen.line((0, y, width, y), fill=(140, 92, 52), width=2)


def mountains(canvas: Image.Image, rng: random.Random) -> None:
    """Peaks with white tops behind a green ground."""
    width, height = canvas.size
    ground(canvas, rng, (175, 210, 240), (125, 165, 95), 0.66)
    pen = ImageDraw.Draw(canvas)
    for column in range(3):
        x, top = width * (column + rng.uniform(0.2, 0.8)) / 3, height * rng.uniform(0.08, 0.25)
        half, foot = width * rng.uniform(0.26, 0.36), height * 0.68
        snowline = 0.3
        pen.polygon(((x, top), (x - half, foot), (x + half, foot)), fill=jitter((120, 125, 145), rng, 14))
        low = top + snowline * (foot - top)
        pen.polygon(((x, top), (x - half * snowline, low), (x + half * snowline, low)), fill=(248, 250, 255))


def water(canvas: Image.Image, rng: random.Random) -> None:
    """Open water with light waves under a pale sky."""
    width, height = canvas.size
    pen = ground(canvas, rng, (200, 230, 250), (45, 120, 190), 0.36)
    for _ in range(16):
        x, y, length = rng.uniform(0, width), rng.uniform(height * 0.44, height), rng.uniform(8, 26)
        pen.arc((x - length / 2, y - 3, x + length / 2, y + 3), 200, 340, fill=(165, 210, 240), width=2)


def desert(canvas: Image.Image, rng: random.Random) -> None:
    """Orange dunes under a hot pale sky."""
    width, height = canvas.size
    pen = ground(canvas, rng, (250, 225, 180), (215, 150, 85), 0.64)
    for _ in range(3):
        x, half, top = rng.uniform(0, width), width * rng.uniform(0.25, 0.45), height * rng.uniform(0.5, 0.58)
        pen.ellipse((x - half, top, x + half, height * 0.86), fill=jitter((222, 162, 95), rng, 14))


def sunset(canvas: Image.Image, rng: random.Random) -> None:
    """A sky from purple to orange with a low sun over dark land."""
    width, height = canvas.size
    pen = ImageDraw.Draw(canvas)
    top, bottom = jitter((95, 60, 130), rng), jitter((255, 150, 70), rng)
    line = int(height * rng.uniform(0.66, 0.72))
    for y in range(line):
        share = y / line
        pen.line((0, y, width, y), fill=tuple(round(a + share * (b - a)) for a, b in zip(top, bottom, strict=True)))
    x, radius = width * rng.uniform(0.15, 0.85), width * 0.11
    pen.ellipse((x - radius, line - radius, x + radius, line + radius), fill=(255, 225, 120))
    pen.rectangle((0, line, width, height), fill=jitter((60, 42, 60), rng))


def space(canvas: Image.Image, rng: random.Random) -> None:
    """Black with stars and one or two planets, and no ground."""
    width, height = canvas.size
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, 0, width, height), fill=jitter((14, 12, 30), rng, 6))
    for _ in range(36):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.5, 1.6)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(250, 250, 240))
    for _ in range(rng.randint(1, 2)):
        x, y, radius = rng.choice((0.12, 0.88)) * width, rng.choice((0.15, 0.85)) * height, rng.uniform(8, 15)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=jitter((190, 110, 90), rng, 50))


def table(canvas: Image.Image, rng: random.Random) -> None:
    """A brown table top with grain in front of a dim wall."""
    width, height = canvas.size
    pen = ground(canvas, rng, (120, 140, 150), (160, 105, 62), 0.5)
    for _ in range(14):
        x, y = rng.uniform(-20, width), rng.uniform(height * 0.55, height)
        pen.line((x, y, x + rng.uniform(20, 60), y), fill=jitter((135, 84, 46), rng, 8), width=1)


SCENES = {
    "beach": beach,
    "grass": grass,
    "snow": snow,
    "forest": forest,
    "city": city,
    "night": night,
    "room": room,
    "mountains": mountains,
    "water": water,
    "desert": desert,
    "sunset": sunset,
    "space": space,
    "table": table,
}


def paint_background(name: str, size: int, rng: random.Random) -> Image.Image:
    """Returns a (size, size) RGB background of a plain colour or scene by name, or clutter."""
    if name == CLUTTER:
        return clutter(size, rng)
    if name in SCENES:
        canvas = Image.new("RGB", (128, 128))
        SCENES[name](canvas, rng)
        return canvas.resize((size, size), Image.Resampling.LANCZOS)
    return Image.new("RGB", (size, size), PLAIN[name] if name == "white" else jitter(PLAIN[name], rng, 8))
