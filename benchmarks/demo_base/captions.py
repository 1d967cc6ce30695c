"""What a composed picture shows, and captions that are true of it."""

import random
from dataclasses import dataclass

from lowmem_db.evaluation.captions import PLAIN, SCENES

PLURAL = ("glasses",)
POSITIONS = ("left", "right", "top", "bottom")
STYLE_PHRASES = {
    "photo": ("a photo of ", "a photograph of "),
    "pixel art": ("pixel art of ", "a pixel art picture of "),
    "sketch": ("a sketch of ", "a pencil sketch of "),
    "watercolor": ("a watercolor of ", "a watercolor painting of "),
    "black and white": ("a black and white picture of ", "a black and white drawing of "),
}


@dataclass(frozen=True)
class Attributes:
    """What is visible in one composed picture.

    Attributes:
        noun: what is drawn.
        flat: whether the drawing is in a flat style.
        colour: name of the colour that the drawing was tinted in, or None for its own colours.
        background: name of a plain colour or of a scene, or clutter, which is not named.
        position: "left", "right", "top", "bottom", or None in the middle.
        size: "small", "large" or None.
        second: noun of what stands to the right of the first, or None.
        second_colour: as colour, of the second.
        wearing: "hat" or "glasses" on the first, or None.
        wearing_colour: colour of what is worn.
        style: one of STYLE_PHRASES, or None for a plain drawing.
    """

    noun: str
    flat: bool = False
    colour: str | None = None
    background: str = "white"
    position: str | None = None
    size: str | None = None
    second: str | None = None
    second_colour: str | None = None
    wearing: str | None = None
    wearing_colour: str | None = None
    style: str | None = None


def article(phrase: str) -> str:
    """Returns the phrase with its indefinite article; plurals have none."""
    if phrase.split()[-1] in PLURAL:
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def background_phrase(background: str, rng: random.Random) -> str:
    """Returns how the background is named in a caption."""
    if background in SCENES:
        return rng.choice(SCENES[background])
    return f"on {article(background)} background"


def style_phrase(shown: Attributes, rng: random.Random) -> str:
    """Returns a prefix such as "a drawing of": mostly none, unless the picture is in a style with a name."""
    if shown.style and rng.random() < 0.95:
        return rng.choice(STYLE_PHRASES[shown.style])
    if shown.style or rng.random() > 0.25:
        return ""
    return rng.choice(("a drawing of ", "a picture of ") + (("a flat drawing of ",) if shown.flat else ()))


def first_phrase(shown: Attributes, rng: random.Random, filler: list[str] | None) -> str:
    """Returns the first noun with what is said before it and what it wears."""
    words = [shown.noun]
    if shown.colour and rng.random() < 0.95:
        words.insert(0, shown.colour)
    if filler and rng.random() < 0.06:
        words.insert(0, rng.choice(filler))
    if shown.size and rng.random() < 0.7:
        words.insert(0, shown.size)
    phrase = article(" ".join(words))
    if shown.wearing and rng.random() < 0.95:
        said = f"{shown.wearing_colour} {shown.wearing}" if rng.random() < 0.8 else shown.wearing
        phrase += f" wearing {article(said)}"
    return phrase


def with_second(first: str, shown: Attributes, rng: random.Random) -> str:
    """Returns the phrase of both subjects."""
    second = article(f"{shown.second_colour} {shown.second}" if shown.second_colour else str(shown.second))
    if rng.random() < 0.25:
        return f"{first} on the left and {second} on the right"
    return f"{first} {rng.choice(('and', 'and', 'next to'))} {second}"


def compose_caption(shown: Attributes, rng: random.Random, filler: list[str] | None = None) -> str:
    """Returns a true caption that names some of what is shown, often very little.

    Args:
        shown: what the picture shows.
        rng: source of the choices.
        filler: words of which one is now and then put before the noun, so that the model keeps drawing the
            noun next to words that it does not know (an identifier such as "sks").
    """
    prefix = style_phrase(shown, rng)
    caption = first_phrase(shown, rng, filler)
    if shown.second:
        caption = with_second(caption, shown, rng)
    elif shown.position and rng.random() < 0.85:
        caption += f" {'on' if shown.position in ('left', 'right') else 'at'} the {shown.position}"
    is_named = shown.background in PLAIN or shown.background in SCENES
    if is_named and rng.random() < (0.25 if shown.background == "white" else 0.93):
        caption += " " + background_phrase(shown.background, rng)
    return prefix + caption
