"""Means, intervals and what they say; nothing here knows a model."""

from collections.abc import Mapping

import torch

from lowmem_db.evaluation.metrics import Score, summarise

Values = Mapping[tuple[str, int], float]
"""A metric by subject and seed."""


def mean_of(values: Values) -> Score:
    """Return the mean over subjects of each subject's mean over its seeds, with its bootstrap interval."""
    pairs: dict[str, list[torch.Tensor]] = {}
    for (subject, _), value in sorted(values.items()):
        pairs.setdefault(subject, []).append(torch.tensor([value], dtype=torch.float64))
    return summarise(pairs)


def paired_difference(values: Values, reference: Values) -> Score:
    """Return the mean difference to a reference over the subjects and seeds that both have."""
    both = values.keys() & reference.keys()
    return mean_of({run: values[run] - reference[run] for run in both})


def direction(difference: Score) -> int | None:
    """Return +1 or -1 where the interval leaves out zero, 0 where it does not, None where there is no interval."""
    if difference.interval is None or difference.num_subjects < 2:
        return None
    low, high = difference.interval
    return 1 if low > 0 else -1 if high < 0 else 0
