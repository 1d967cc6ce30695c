"""What makes a picture more than a flat cut-out: photographic light and grain, and styles with a name."""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps


def smooth_noise(size: int, rng: random.Random, exponent: float = 1.2) -> np.ndarray:
    """Returns (size, size) noise of mean 0 and deviation 1 whose spectrum falls with frequency ** -exponent."""
    generator = np.random.default_rng(rng.getrandbits(32))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((size, size))) * frequency**-exponent, (size, size))
    return (noise - noise.mean()) / noise.std()


def clutter(size: int, rng: random.Random) -> Image.Image:
    """Returns a jumble of muted colours and soft edges, as out-of-focus surroundings are."""
    base = np.array([rng.uniform(50, 200) for _ in range(3)])
    muted = 0.5 * base + 0.5 * base.mean()
    light = smooth_noise(size, rng, rng.uniform(0.9, 1.6))[..., None] * rng.uniform(15, 45)
    tints = np.stack([smooth_noise(size, rng, 1.8) for _ in range(3)], -1) * rng.uniform(4, 18)
    picture = Image.fromarray((muted + light + tints).clip(0, 255).astype(np.uint8))
    for _ in range(rng.randint(0, 4)):
        width, height = (rng.randint(size // 8, size) for _ in range(2))
        patch = Image.new("RGB", (width, height), tuple(int(part * rng.uniform(0.5, 1.4)) for part in muted))
        picture.paste(
            patch, (rng.randint(-width // 2, size), rng.randint(-height // 2, size)), Image.new("L", patch.size, 150)
        )
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3.5)))


def texture(picture: Image.Image, rng: random.Random, amount: float) -> Image.Image:
    """Returns the picture with its brightness moved by smooth noise of the given deviation, of 255."""
    noise = smooth_noise(picture.width, rng, rng.uniform(0.7, 1.4))[..., None] * amount
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def light_from_a_side(cutout: Image.Image, rng: random.Random) -> Image.Image:
    """Returns the RGBA cut-out shaded as if it were rounded and lit from one side."""
    depth = np.asarray(cutout.getchannel("A").filter(ImageFilter.GaussianBlur(cutout.width / 12)), float) / 255
    down, right = np.gradient(depth)
    slope = (right * rng.choice((-1, 1)) + down) * cutout.width / 12
    shade = (1 + 0.6 * slope).clip(0.45, 1.3)[..., None]
    lit = Image.fromarray((np.asarray(cutout.convert("RGB")) * shade).clip(0, 255).astype(np.uint8))
    lit.putalpha(cutout.getchannel("A"))
    return lit


def shadow_of(cutout: Image.Image, rng: random.Random) -> Image.Image:
    """Returns the mask of a soft shadow, to be pasted in black a little below the cut-out."""
    mask = cutout.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(2, 6)))
    return mask.point(lambda value: int(value * 0.5))


def vary_colours(cutout: Image.Image, rng: random.Random, hue: int = 5) -> Image.Image:
    """Returns the RGBA cut-out with hue (of 256), saturation and brightness moved a little."""
    parts = cutout.convert("RGB").convert("HSV").split()
    turn, strong, bright = rng.randint(-hue, hue), rng.uniform(0.8, 1.1), rng.uniform(0.88, 1.08)
    moved = (
        parts[0].point(lambda value: (value + turn) % 256),
        parts[1].point(lambda value: min(255, int(value * strong))),
        parts[2].point(lambda value: min(255, int(value * bright))),
    )
    varied = Image.merge("HSV", moved).convert("RGB")
    varied.putalpha(cutout.getchannel("A"))
    return varied


def as_photo(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Returns the picture with duller colours, a colour cast, uneven light, slight blur and grain."""
    picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.55, 0.95))
    picture = texture(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))), rng, rng.uniform(3, 11))
    cast = np.array([rng.uniform(0.88, 1.06) for _ in range(3)])
    grain = np.random.default_rng(rng.getrandbits(32)).standard_normal((picture.height, picture.width, 1))
    return Image.fromarray((np.asarray(picture) * cast + grain * rng.uniform(0, 6)).clip(0, 255).astype(np.uint8))


def as_pixel_art(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Returns the picture in large square pixels of few colours."""
    small = picture.resize((32, 32), Image.Resampling.BOX).quantize(16, dither=Image.Dither.NONE).convert("RGB")
    return small.resize(picture.size, Image.Resampling.NEAREST)


def as_sketch(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Returns dark outlines on nearly white paper."""
    grey = ImageOps.grayscale(picture)
    blurred = grey.filter(ImageFilter.GaussianBlur(rng.uniform(2, 4)))
    dodged = np.asarray(grey, float) / np.maximum(np.asarray(blurred, float), 1)
    paper = (255 * dodged.clip(0, 1) ** rng.uniform(2, 3)).astype(np.uint8)
    return texture(Image.fromarray(paper).convert("RGB"), rng, 3)


def as_watercolour(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Returns pale washes of colour with soft edges on grainy paper."""
    soft = picture.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(1))
    washed = Image.blend(soft, Image.new("RGB", soft.size, "white"), rng.uniform(0.3, 0.45))
    return texture(washed, rng, rng.uniform(7, 11))


def as_grey(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Returns the picture without colours, at random contrast."""
    return ImageEnhance.Contrast(ImageOps.grayscale(picture).convert("RGB")).enhance(rng.uniform(0.85, 1.15))


PHOTO = "photo"
STYLES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    PHOTO: as_photo,
    "pixel art": as_pixel_art,
    "sketch": as_sketch,
    "watercolor": as_watercolour,
    "black and white": as_grey,
}
