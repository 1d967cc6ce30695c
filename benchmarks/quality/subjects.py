"""The subjects of the ablations: designs that the demo base never saw, and photographed ones."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.demo_base.captions import article

FOLDER = Path(__file__).parent / "subjects"


@dataclass(frozen=True)
class Subject:
    """A subject with five pictures in ``subjects/NAME``.

    Attributes:
        name: Name of its folder.
        noun: Its class, a noun that the demo base draws.
        wrong_noun: A class that it does not belong to, chosen by hand; empty where it is drawn at random alone.
        kind: ``drawn``, in the style of the base, or ``photo``, far from it.
        rich: Whether the base learned several designs of the class, so that there is a prior to preserve.
    """

    name: str
    noun: str
    wrong_noun: str
    kind: Literal["drawn", "photo"]
    rich: bool = True

    @property
    def class_prompt(self) -> str:
        """Return the prompt of the class."""
        return article(self.noun)

    @property
    def folder(self) -> Path:
        """Return where its pictures are."""
        return FOLDER / self.name

    @property
    def pictures(self) -> list[Path]:
        """Return its pictures, in order."""
        return sorted(path for path in self.folder.iterdir() if path.suffix in {".png", ".jpg"})


FIRST_SUBJECTS = (
    Subject("drawn_dog", "dog", "car", "drawn"),
    Subject("drawn_cat", "cat", "house", "drawn"),
    Subject("drawn_clock", "clock", "dog", "drawn"),
    Subject("drawn_car", "car", "flower", "drawn"),
    Subject("drawn_flower", "flower", "shoe", "drawn"),
    Subject("dog3", "dog", "car", "photo"),
    Subject("rc_car", "car", "flower", "photo"),
    Subject("robot_toy", "robot", "cat", "photo", rich=False),
    Subject("bear_plushie", "teddy bear", "house", "photo", rich=False),
)
TEN = (
    Subject("drawn_backpack", "backpack", "", "drawn"),
    Subject("drawn_shoe", "shoe", "", "drawn"),
    Subject("drawn_cup", "cup", "", "drawn"),
    Subject("drawn_house", "house", "", "drawn"),
    Subject("drawn_fish", "fish", "", "drawn"),
    Subject("drawn_hat", "hat", "", "drawn"),
    Subject("drawn_bird", "bird", "", "drawn"),
    *(subject for subject in FIRST_SUBJECTS if subject.name in {"drawn_cat", "drawn_car", "drawn_flower"}),
)
"""Drawn subjects on which no regime was tuned; the first seven were not looked at before the list was fixed."""

SUBJECTS = tuple(dict.fromkeys((*FIRST_SUBJECTS, *TEN)))
BY_NAME = {subject.name: subject for subject in SUBJECTS}

WRONG_NOUN_SEED = 4


def draw_wrong_nouns(subjects: Sequence[Subject], seed: int) -> Mapping[str, str]:
    """Return a noun of another subject for each, drawn at random; every noun is given once."""
    rng, nouns = random.Random(seed), [subject.noun for subject in subjects]
    while any(subject.noun == noun for subject, noun in zip(subjects, nouns, strict=True)):
        rng.shuffle(nouns)
    return {subject.name: noun for subject, noun in zip(subjects, nouns, strict=True)}


RANDOM_NOUNS = draw_wrong_nouns(TEN, WRONG_NOUN_SEED)
