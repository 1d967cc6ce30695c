"""Captions as lists of tags: orders and omissions, which keep a model from learning the place of a tag.

A caption gets a fixed number of variants, which are encoded once like the crops of a photo; each sample draws one of
them. So text encoders need not stay in memory, and a resume needs only the step number.
"""

import torch

from lowmem_db.config.schema import DataConfig
from lowmem_db.randomness import generator, permutation

NUM_VARIANTS = 16
_SEPARATOR = ","


def varies(config: DataConfig) -> bool:
    """Return whether captions have variants."""
    return config.shuffle_tags or config.tag_dropout > 0


def caption_variants(caption: str, config: DataConfig, seed: int) -> tuple[str, ...]:
    """Return the variants of a caption; one that has nothing to shuffle or to leave out is its only variant.

    Args:
        caption: Tags separated by commas; the first ``data.keep_tags`` always stay in their places.
        config: The section ``data``.
        seed: The run's seed.
    """
    tags = [tag for tag in (part.strip() for part in caption.split(_SEPARATOR)) if tag]
    num_kept = config.keep_tags or 0
    kept, others = tags[:num_kept], tags[num_kept:]
    if not varies(config) or not others or len(tags) == 1:
        return (caption,)
    count = config.num_caption_variants or NUM_VARIANTS
    made = [[*kept, *_variant(others, config, seed, caption, number)] or tags[:1] for number in range(count)]
    return tuple(f"{_SEPARATOR} ".join(variant) for variant in made)


def _variant(tags: list[str], config: DataConfig, seed: int, caption: str, number: int) -> list[str]:
    order = permutation(seed, f"tags {caption}", number, len(tags)) if config.shuffle_tags else range(len(tags))
    random = generator(seed, f"tag_dropout {caption}", number)
    stays = torch.rand(len(tags), generator=random) >= config.tag_dropout
    return [tags[index] for index in order if stays[index]]
