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
    samples = photos_per_epoch(config, repeats=repeats)
    if config.prior.enabled:
        classes = {(subject.class_prompt, subject.class_dir) for subject in config.subjects}
        samples = max(samples, len(classes) * config.prior.num_class_images)
    batches = ceil(samples / config.training.train_batch_size)
    return ceil(batches / (config.training.gradient_accumulation_steps * config.distributed.num_processes))


def photos_per_epoch(config: Config, *, repeats: int = 1) -> int:
    """Return the photos of one pass, each as often as it counts.

    Raises:
        DataError: The photo folder cannot be read.
    """
    return repeats * sum(_photos_of(config, number) for number in range(len(config.subjects)))


def _photos_of(config: Config, number: int) -> int:
    subject = config.subjects[number]
    field = "subject.instance_dir" if number == 0 else f"subject.concepts[{number - 1}].instance_dir"
    return subject.repeats * len(look_into(subject.instance_dir, field).photos)
