"""The metrics of arXiv:2208.12242 (sections 4.2 and 4.3) as arithmetic on embeddings, without any model.

A metric is a mean over pairs. Its pairs are grouped by what the bootstrap resamples: a list of tensors for each
subject, one tensor for each prompt, one value for each pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Pairs = list[Tensor]
"""Values of the pairs of one subject: one tensor for each prompt."""

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric over subjects.

    Attributes:
        value: The mean over subjects of each subject's mean over its pairs, or None if there are no pairs.
        interval: Bootstrap interval of ``CONFIDENCE`` over subjects and prompts, or None if there is one of each.
        num_pairs: Number of pairs.
        num_subjects: Number of subjects with pairs.
    """

    value: float | None
    interval: tuple[float, float] | None
    num_pairs: int
    num_subjects: int

    def as_json(self) -> dict[str, Any]:
        """Return its JSON value for reports."""
        return {
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "num_pairs": self.num_pairs,
            "num_subjects": self.num_subjects,
        }


def cosine_similarities(rows: Float[Tensor, "n d"], columns: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return the cosine of every vector in ``rows`` with every vector in ``columns``."""
    return functional.normalize(rows.double(), dim=1) @ functional.normalize(columns.double(), dim=1).T


def fidelity_pairs(images: Sequence[Float[Tensor, "_ d"]], photos: Float[Tensor, "m d"]) -> Pairs:
    """Compare the images of each prompt with all photos: DINO and CLIP-I of section 4.1."""
    return [cosine_similarities(of_prompt, photos).flatten() for of_prompt in images]


def real_pairs(photos: Float[Tensor, "m d"]) -> Pairs:
    """Compare the photos of a subject with each other: the row "Real Images" of Table 1."""
    return [_of_two(cosine_similarities(photos, photos))]


def prompt_pairs(images: Sequence[Float[Tensor, "_ d"]], prompts: Float[Tensor, "p d"]) -> Pairs:
    """Compare the images of each prompt with the prompt itself: CLIP-T of section 4.1."""
    return [
        cosine_similarities(of_prompt, prompt[None]).flatten()
        for of_prompt, prompt in zip(images, prompts, strict=True)
    ]


def preservation_pairs(class_images: Float[Tensor, "n d"], photos: Float[Tensor, "m d"]) -> Pairs:
    """Compare each image of the class with all photos of the subject: PRES of section 4.3; lower is better."""
    return list(cosine_similarities(class_images, photos))


def cosine_distances(images: Float[Tensor, "n d"]) -> Float[Tensor, " pairs"]:
    """Return one minus the cosine for each pair of rows: the diversity of one prompt; higher is better."""
    return 1 - _of_two(cosine_similarities(images, images))


def summarise(pairs: Mapping[str, Pairs], *, seed: int = 0) -> Score:
    """Return the mean, its interval and the numbers of pairs and subjects.

    Args:
        pairs: The pairs of each subject.
        seed: Seed of the bootstrap.
    """
    filled = {name: [values for values in of_subject if len(values)] for name, of_subject in pairs.items()}
    groups = [of_subject for of_subject in filled.values() if of_subject]
    if not groups:
        return Score(value=None, interval=None, num_pairs=0, num_subjects=0)
    return Score(
        value=float(np.mean([float(torch.cat(of_subject).double().mean()) for of_subject in groups])),
        interval=_bootstrap(groups, np.random.default_rng(seed)),
        num_pairs=sum(len(values) for of_subject in groups for values in of_subject),
        num_subjects=len(groups),
    )


def _of_two(matrix: Float[Tensor, "n n"]) -> Tensor:
    """Return the values above the diagonal: each pair once, none with itself."""
    row, column = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return matrix[row, column]


def _bootstrap(groups: Sequence[Pairs], random: np.random.Generator) -> tuple[float, float] | None:
    """Resample subjects, and the prompts within each of them, with replacement (percentile bootstrap)."""
    if len(groups) == 1 and len(groups[0]) == 1:
        return None
    sums = [np.array([float(values.double().sum()) for values in of_subject]) for of_subject in groups]
    counts = [np.array([len(values) for values in of_subject]) for of_subject in groups]
    drawn = random.integers(0, len(groups), (NUM_RESAMPLES, len(groups)))
    means = np.empty(drawn.shape)
    for subject, (sum_of, count_of) in enumerate(zip(sums, counts, strict=True)):
        is_drawn = drawn == subject
        prompts = random.integers(0, len(sum_of), (int(is_drawn.sum()), len(sum_of)))
        means[is_drawn] = sum_of[prompts].sum(axis=1) / count_of[prompts].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means.mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
