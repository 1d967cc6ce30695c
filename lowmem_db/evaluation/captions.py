"""Parsing composed captions and checking whether images show them: prompt fidelity without network access.

A small classifier, trained on drawings, names the noun, the colour and the background of an image. It knows only the
captions that the demo base was trained on; its accuracy is in ``accuracy.json`` next to its weights.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lowmem_db.evaluation.efficientnet_lite import NUM_FEATURES
from lowmem_db.evaluation.metrics import Pairs

NOUNS = (
    "dog", "dog face", "cat", "cat face", "clock", "bird", "car", "flower", "cup", "house", "tree", "shoe", "boot",
    "hat", "glasses", "fish", "ball", "apple", "horse", "rabbit", "umbrella", "backpack", "teddy bear", "robot",
    "butterfly", "elephant", "penguin", "pig", "owl", "turtle", "mushroom", "bus", "airplane", "boat", "banana",
    "strawberry", "cake", "guitar", "crown", "bell", "snowman", "pumpkin", "bear", "frog", "lion", "cow", "monkey",
    "panda", "bee", "octopus", "fox", "snail", "train", "bicycle", "truck", "rocket", "bowl", "vase", "candle", "book",
    "camera", "television", "gift", "star", "lemon", "pineapple", "hamburger", "dress", "teapot", "balloon",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
PLAIN = ("white", "blue", "yellow", "green", "red", "pink", "purple", "orange", "gray", "black")
SCENES = {
    "beach": ("on the beach", "on a beach"),
    "grass": ("on the grass", "on a meadow", "in a meadow"),
    "snow": ("in the snow", "on the snow"),
    "forest": ("in the forest", "in a forest"),
    "city": ("in the city", "in a city", "on a street"),
    "night": ("at night", "under a night sky"),
    "room": ("on a wooden floor", "in a room"),
    "mountains": ("in the mountains", "in front of a mountain"),
    "water": ("on the water", "floating on water"),
    "desert": ("in the desert", "in a desert"),
    "sunset": ("at sunset", "under a sunset sky"),
    "space": ("in space", "in outer space"),
    "table": ("on a table", "on a wooden table"),
}
LABELS = {"noun": NOUNS, "colour": COLOURS, "background": (*PLAIN, *SCENES)}
FOLDER = Path(__file__).parent / "caption_classifier"
WEIGHTS_FILE = "classifier.safetensors"
ACCURACY_FILE = "accuracy.json"
PIXELS = 224
"""Height and width of the classifier's input, at which EfficientNet-Lite0 was trained."""

_PREFIX = re.compile(
    r"(?:an? (?:flat drawing|drawing|picture|photo|photograph|painting|(?:pencil )?sketch|watercolor(?: painting)?"
    r"|pixel art picture|black and white (?:picture|drawing))|pixel art) of "
)
_POSITION = re.compile(r" (?:on the (?:left|right)|at the (?:top|bottom))$")
_SIZES = ("small", "large")
_BACKGROUNDS = {f" on {'an' if name[0] in 'aeiou' else 'a'} {name} background": name for name in PLAIN} | {
    f" {phrase}": scene for scene, phrases in SCENES.items() for phrase in phrases
}
_LONGEST_FIRST = sorted(NOUNS, key=len, reverse=True)
_NO_IDENTIFIERS = {
    *PLAIN, *(word for noun in NOUNS for word in noun.split()), *_SIZES, "a", "an", "the", "of", "on", "in", "at",
    "and", "with", "without", "no", "not",
}  # fmt: skip
_SMALL = 128
_LEVELS = 6
_GRID = 8
_BORDER = 6
_DIFFERS = 0.12
_NUM_STATISTICS = 3 * _GRID**2 + 2 * _LEVELS**3


@dataclass(frozen=True, kw_only=True)
class Caption:
    """The content of a caption, or of an image according to the classifier.

    Attributes:
        noun: One of ``NOUNS``.
        colour: Colour of the noun, or None if the caption names none.
        background: A plain colour or a scene, or None if the caption names none.
    """

    noun: str
    colour: str | None = None
    background: str | None = None


def read_caption(prompt: str) -> Caption | None:
    """Return the content of a composed caption, or None if it contains something that the classifier does not know.

    A prefix such as "a photo of", a size, a position and one unknown word before the noun or its colour (an identifier
    such as "sks") are skipped. All text after the noun must be known.
    """
    text = " ".join(prompt.lower().split()).rstrip(".")
    prefix = _PREFIX.match(text)
    text = text[prefix.end() :] if prefix else text
    phrase = next((phrase for phrase in _BACKGROUNDS if text.endswith(phrase)), "")
    words = _POSITION.sub("", text.removesuffix(phrase)).split()
    words = words[1:] if words[:1] in (["a"], ["an"]) else words
    noun = next((noun for noun in _LONGEST_FIRST if words[-len(noun.split()) :] == noun.split()), None)
    if noun is None:
        return None
    before = [word for word in words[: -len(noun.split())] if word not in _SIZES]
    colours = [word for word in before if word in COLOURS]
    others = [word for word in before if word not in COLOURS]
    if len(colours) > 1 or len(others) > 1 or not all(_may_be_skipped(word) for word in others):
        return None
    return Caption(noun=noun, colour=colours[0] if colours else None, background=_BACKGROUNDS.get(phrase))


def caption_pairs(said: Sequence[Caption], shown: Sequence[Sequence[Caption]]) -> dict[str, Pairs]:
    """Return, by attribute, one (the image shows what its caption says) or zero for each image of each caption.

    Args:
        said: The captions.
        shown: The classifier's answers for the images of each caption.
    """
    found: dict[str, Pairs] = {attribute: [] for attribute in LABELS}
    for caption, images in zip(said, shown, strict=True):
        for attribute, pairs in found.items():
            wanted = getattr(caption, attribute)
            if wanted is not None and images:
                pairs.append(torch.tensor([float(getattr(image, attribute) == wanted) for image in images]))
    return found


class CaptionClassifier(nn.Module):
    """The noun by one linear layer on EfficientNet-Lite0's features, the others from pixel statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.noun = nn.Linear(NUM_FEATURES, len(LABELS["noun"]))
        self.colour = _head(_NUM_STATISTICS, 128, len(LABELS["colour"]))
        self.background = _head(_NUM_STATISTICS, 128, len(LABELS["background"]))

    def forward(
        self, features: Float[Tensor, "b 1280"], statistics: Float[Tensor, "b statistics"]
    ) -> dict[str, Float[Tensor, "b labels"]]:
        """Return logits by attribute, in the order of ``LABELS``."""
        return {
            "noun": self.noun(noun_inputs(features)),
            "colour": self.colour(statistics),
            "background": self.background(statistics),
        }

    @torch.no_grad()
    def name(self, features: Float[Tensor, "b 1280"], statistics: Float[Tensor, "b statistics"]) -> list[Caption]:
        """Return the most likely noun, colour and background of each picture."""
        answers = {attribute: logits.argmax(1).tolist() for attribute, logits in self(features, statistics).items()}
        named = {attribute: [LABELS[attribute][index] for index in indices] for attribute, indices in answers.items()}
        return [
            Caption(noun=noun, colour=colour, background=background)
            for noun, colour, background in zip(named["noun"], named["colour"], named["background"], strict=True)
        ]


def noun_inputs(features: Float[Tensor, "b 1280"]) -> Float[Tensor, "b 1280"]:
    """Return what the noun is read from: square roots, each picture's with mean 0 and deviation 1."""
    return functional.layer_norm(features.sqrt(), (NUM_FEATURES,))


def load_classifier(folder: Path = FOLDER) -> CaptionClassifier:
    """Load the classifier in evaluation mode, in fp32."""
    classifier = CaptionClassifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS_FILE).items()})
    return classifier.eval().requires_grad_(False)


def read_accuracy() -> dict[str, Any]:
    """Return the classifier's accuracy on drawings in a style it was not trained on, by attribute."""
    return json.loads((FOLDER / ACCURACY_FILE).read_text(encoding="utf-8"))


def accuracy_on(captions: Sequence[Caption], attribute: str) -> float | None:
    """Return the classifier's mean accuracy on what captions name, or None if it was not measured on that."""
    of_labels = read_accuracy()["labels"][attribute]
    found = [of_labels[name] for caption in captions if (name := getattr(caption, attribute)) in of_labels]
    return sum(found) / len(found) if found else None


def pixel_statistics(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b statistics"]:
    """Return statistics of colour and background: a coarse picture, and histograms of all pixels and of the foreground.

    Args:
        pixels: Values in [0, 255].
    """
    values = _shrink(pixels)
    is_foreground = _foreground(values).flatten(1)
    levels = (values * _LEVELS).long().clamp(max=_LEVELS - 1).flatten(2)
    bins = (levels[:, 0] * _LEVELS + levels[:, 1]) * _LEVELS + levels[:, 2]
    return torch.cat(
        (
            functional.adaptive_avg_pool2d(values, _GRID).flatten(1),
            _histogram(bins, torch.ones_like(is_foreground)),
            _histogram(bins, is_foreground),
        ),
        dim=1,
    )


def foreground_centre(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2"]:
    """Return the centre of mass (x, y) of the foreground as shares of the side; the middle where there is none.

    Args:
        pixels: Values in [0, 255], best of one subject on a plain background.
    """
    is_foreground = _foreground(_shrink(pixels))
    places = (torch.arange(_SMALL, device=pixels.device) + 0.5) / _SMALL
    amount = is_foreground.sum(dim=(1, 2))
    sums = torch.stack((is_foreground.sum(1) @ places, is_foreground.sum(2) @ places), dim=1)
    return torch.where(amount[:, None] > 0, sums / amount[:, None].clamp(min=1), 0.5)


def _shrink(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 small small"]:
    """Return the pictures at the size that statistics are taken at, with values in [0, 1]."""
    return functional.interpolate(pixels / 255, size=(_SMALL, _SMALL), mode="bilinear", antialias=True).clamp(0, 1)


def _foreground(values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
    """Return one where a picture differs from the left and right border of its row: backgrounds change downwards."""
    both = torch.cat((values[..., :_BORDER], values[..., -_BORDER:]), dim=-1)
    border = both.sort(dim=-1).values[..., _BORDER - 1, None]  # the median, whose operator CUDA refuses after a run
    return ((values - border).abs().amax(dim=1) > _DIFFERS).float()


def _histogram(bins: Int[Tensor, "b n"], weights: Float[Tensor, "b n"]) -> Float[Tensor, "b bins"]:
    """Return the square root of the share of each bin."""
    counts = torch.zeros(len(bins), _LEVELS**3, device=bins.device).scatter_add(1, bins, weights)
    return (counts / weights.sum(dim=1, keepdim=True).clamp(min=1)).sqrt()


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, outputs))


def _may_be_skipped(word: str) -> bool:
    """Return whether a word before the noun may be an identifier, which is not a word of composed captions."""
    return word.isalnum() and word not in _NO_IDENTIFIERS
