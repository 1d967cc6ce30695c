"""Near-duplicates among the photos, which inflate fidelity and the value of the photos compared with each other."""

from collections.abc import Sequence
from itertools import combinations

from jaxtyping import Float
from torch import Tensor

from lowmem_db.evaluation.metrics import cosine_similarities

THRESHOLD = 0.92
"""Cosine of EfficientNet-Lite0's features at or above which two photos are reported.

In the data set of arXiv:2208.12242 the mirrored pair (dog5) has 0.97 and the shifted pair (cat) 0.96; the most similar
of the other pairs, a dog in nearly the same pose, has 0.88.
"""


def near_duplicates(names: Sequence[str], embeddings: Float[Tensor, "n d"]) -> list[tuple[str, str, float]]:
    """Return the pairs of photos at or above the threshold with their cosine, the most similar first."""
    cosines = cosine_similarities(embeddings, embeddings)
    found = [
        (names[one], names[other], float(cosines[one, other]))
        for one, other in combinations(range(len(names)), 2)
        if cosines[one, other] >= THRESHOLD
    ]
    return sorted(found, key=lambda pair: -pair[2])
