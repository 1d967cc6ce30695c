"""Passes through the photos, in optimizer steps."""

from math import ceil

from lowmem_db.config.schema import Config
from lowmem_db.data.folder import look_into


def steps_per_epoch(config: Config, *, repeats: int = 1) -> int:
    """Return the optimizer steps of one pass through the photos or the class images, whichever are more.

    Args:
        config: The configuration.
        repeats: How often a photo counts.

    Raises:
        DataError: The photo folder cannot be read.
    """
    samples = repeats * len(look_into(config.subject.instance_dir, "subject.instance_dir").photos)
    if config.prior.enabled:
        samples = max(samples, config.prior.num_class_images)
    batches = ceil(samples / config.training.train_batch_size)
    return ceil(batches / config.training.gradient_accumulation_steps)
