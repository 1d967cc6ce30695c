"""How metrics go with what people prefer, as in the supplement of arXiv:2208.12242.

There DINO's scores have a Pearson correlation of 0.32 with "normalized human preference scores" (p = 9.44e-30),
CLIP-I's 0.27. The p-value fits 1,200 pairs of numbers: the two images of each of the 600 questions of the study. So
each image has a score here, and the share of its question's answers that preferred it; an undecided answer is half of
one for both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_db.data.photos import read_photo
from lowmem_db.errors import DataError
from lowmem_db.evaluation.encoders import Encoder, EncoderFiles, load_encoder
from lowmem_db.evaluation.folders import Limits, find_subjects
from lowmem_db.evaluation.metrics import fidelity_pairs, prompt_pairs
from lowmem_db.evaluation.questionnaire import KINDS, ImagePair, Kind, check_methods, find_pairs, identity_of, study_key
from lowmem_db.evaluation.scoring import METRICS, Role
from lowmem_db.evaluation.tally import UNDECIDED, Answers, read_answers, votes_of

PAPER = {"DINO": 0.32, "CLIP-I": 0.27}
"""Pearson's correlation with people's preferences about the subject, in the paper."""
_ROLES: dict[Kind, Role] = {"subject": "fidelity", "prompt": "prompt"}
_CONFIDENCE = 1.959964
_FEWEST = 4


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Pearson's correlation of a metric with preferences.

    Attributes:
        value: The coefficient.
        interval: Its interval of 95 %, by Fisher's transformation.
        p_value: By the same; too small, because the two images of a question are not independent.
        num_images: Number of images.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    num_images: int


def correlate(
    files: Sequence[Path],
    folders: Sequence[Path],
    real: Path | None,
    limits: Limits,
    encoders: Sequence[EncoderFiles],
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Correlate what people answered with metrics of the images that they saw.

    Args:
        files: Answer files of the questionnaires.
        folders: The two folders that the questionnaires were made of.
        real: The photos they were made with.
        limits: The limits they were made with.
        encoders: Encoders of the metrics.
        device: Device of the encoders.

    Returns:
        By study and metric, the fields of :class:`Correlation`.

    Raises:
        DataError: The questionnaires were made of other images, or too few were answered.
    """
    answers = read_answers(files)
    check_methods(folders, "--correlate")
    first, second = (find_subjects(folder, real, None, limits) for folder in folders)
    loaded = [load_encoder(each, device) for each in encoders]
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        own = [each for each in answers if votes_of(each, kind)]
        metrics = [(encoder, name) for encoder in loaded if (name := METRICS[encoder.files.kind].get(_ROLES[kind]))]
        if not own or not metrics:
            continue
        every = find_pairs(first, second, num_pairs=10**9, seed=own[0].seed, kind=kind)
        rated = _rated(_of_study(every, own[0], kind), own, kind)
        shares = [share for _, both in rated for share in both]
        found[kind] = {
            name: vars(pearson([score for pair, _ in rated for score in _scores(encoder, pair, kind)], shares))
            for encoder, name in metrics
        }
    if not found:
        raise DataError(
            "--correlate: no encoder has a metric for these studies; allowed: en0, identity, dino or clip for the one "
            "about the subject, clip for the one about the prompt"
        )
    return found


def correlation_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the correlations as a table, header first."""
    rows = [
        [
            f"{kind} fidelity",
            name,
            f"{one['value']:.2f}",
            f"{one['interval'][0]:.2f} to {one['interval'][1]:.2f}",
            f"{one['p_value']:.2g}",
            str(one["num_images"]),
            f"{PAPER[name]:.2f}" if kind == "subject" and name in PAPER else "-",
        ]
        for kind, metrics in found.items()
        for name, one in metrics.items()
    ]
    return [["study", "metric", "Pearson", "95 % interval", "p", "images", "paper"], *rows]


def pearson(scores: Sequence[float], shares: Sequence[float]) -> Correlation:
    """Return Pearson's correlation.

    Raises:
        DataError: There are too few images, or one of the two is always the same.
    """
    if len(scores) < _FEWEST or np.ptp(scores) == 0 or np.ptp(shares) == 0:
        raise DataError(
            f"--correlate: {len(scores)} images with answers, whose scores or preferences do not differ, say nothing; "
            "allowed: answers to at least two questions, not all undecided"
        )
    value = float(np.corrcoef(scores, shares)[0, 1])
    if abs(value) >= 1:
        return Correlation(value=value, interval=(value, value), p_value=0.0, num_images=len(scores))
    moved, error = math.atanh(value), 1 / math.sqrt(len(scores) - 3)
    low, high = (math.tanh(moved + side * _CONFIDENCE * error) for side in (-1, 1))
    p_value = math.erfc(abs(moved) / error / math.sqrt(2))
    return Correlation(value=value, interval=(low, high), p_value=p_value, num_images=len(scores))


def _of_study(pairs: Sequence[ImagePair], answers: Answers, kind: Kind) -> Sequence[ImagePair]:
    """Return the pairs that the questionnaires were made of: the first ones, as many as their key says."""
    identities = [identity_of(pair) for pair in pairs]
    for count in range(len(pairs), 0, -1):
        if study_key(kind, answers.names, identities[:count], answers.seed) == answers.study:
            return pairs[:count]
    raise DataError(
        f"--correlate: the questionnaires compare other images of {' and '.join(answers.names)} than these folders "
        "have; allowed: the two folders that --pairs was given, unchanged, in the same order, with the same --real, "
        "--subjects, --prompts and --images"
    )


def _rated(
    pairs: Sequence[ImagePair], answers: Sequence[Answers], kind: Kind
) -> list[tuple[ImagePair, tuple[float, float]]]:
    """Return each pair that was answered, with the share of answers that prefer each of its images."""
    votes: dict[int, list[float]] = {}
    for each in answers:
        for question, choice in votes_of(each, kind):
            share = 0.5 if choice == UNDECIDED else float(choice == each.names[0])
            votes.setdefault(int(question.partition("-")[2]), []).append(share)
    means = {index: sum(shares) / len(shares) for index, shares in votes.items()}
    return [(pairs[index], (mean, 1 - mean)) for index, mean in sorted(means.items())]


def _scores(encoder: Encoder, pair: ImagePair, kind: Kind) -> list[float]:
    """Return the metric of both images of a pair."""
    images = [[read_photo(file)] for file in pair.files]
    drawn = [encoder.embed_images(one) for one in images]
    if kind == "prompt":
        text = encoder.embed_texts([str(pair.prompt)])
        return [float(values.mean()) for values in prompt_pairs(drawn, text.expand(len(drawn), -1))]
    photos = encoder.embed_images([read_photo(file) for file in pair.subject.photos])
    return [float(values.mean()) for values in fidelity_pairs(drawn, photos)]
