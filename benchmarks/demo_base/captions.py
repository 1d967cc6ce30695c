"""What a composed picture shows, and captions that are true of it."""

import random
from dataclasses import dataclass

from lowmem_db.evaluation.captions import SCENES

PLURAL = ("glasses",)
POSITIONS = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Attributes:
    """What is visible in one composed picture.

    Attributes:
        noun: what is drawn.
        flat: whether the drawing is in a flat style.
        colour: name of the colour that the drawing was tinted in, or None for its own colours.
        background: name of a plain colour or of a scene.
        position: "left", "right", "top", "bottom", or None in the middle.
        size: "small", "large" or None.
    """

    noun: str
    flat: bool = False
    colour: str | None = None
    background: str = "white"
    position: str | None = None
    size: str | None = None


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


def style_phrase(flat: bool, rng: random.Random) -> str:
    """Returns a prefix such as "a drawing of", mostly none."""
    if rng.random() > 0.25:
        return ""
    return rng.choice(("a drawing of ", "a picture of ") + (("a flat drawing of ",) if flat else ()))


def compose_caption(shown: Attributes, rng: random.Random, filler: list[str] | None = None) -> str:
    """Returns a true caption that names some of what is shown, often very little.

    Args:
        shown: what the picture shows.
        rng: source of the choices.
        filler: words of which one is now and then put before the noun, so that the model keeps drawing the
            noun next to words that it does not know (an identifier such as "sks").
    """
    words = [shown.noun]
    if shown.colour and rng.random() < 0.95:
        words.insert(0, shown.colour)
    if filler and rng.random() < 0.06:
        words.insert(0, rng.choice(filler))
    if shown.size and rng.random() < 0.7:
        words.insert(0, shown.size)
    caption = style_phrase(shown.flat, rng) + article(" ".join(words))
    if shown.position and rng.random() < 0.8:
        caption += f" {'on' if shown.position in ('left', 'right') else 'at'} the {shown.position}"
    if rng.random() < (0.25 if shown.background == "white" else 0.93):
        caption += " " + background_phrase(shown.background, rng)
    return caption
