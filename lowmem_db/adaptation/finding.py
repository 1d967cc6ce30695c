"""Choosing what trains from the configuration; no other place does."""

from lowmem_db.adaptation.adapters import LowRankAdapters
from lowmem_db.adaptation.base import Adaptation
from lowmem_db.adaptation.embeddings import LearnedEmbedding
from lowmem_db.adaptation.full import FullWeights
from lowmem_db.config.schema import Config


def find_adaptation(config: Config) -> Adaptation:
    """Return what trains.

    Args:
        config: The resolved configuration.
    """
    if config.textual_inversion.enabled:
        return LearnedEmbedding(config)
    return LowRankAdapters(config) if config.lora.enabled else FullWeights(config)
