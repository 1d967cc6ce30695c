"""Aspect-ratio buckets: sizes with similar pixel counts, so that photos lose little and cost the same."""

import math
from collections.abc import Sequence

from lowmem_db.config.schema import DataConfig
from lowmem_db.errors import ConfigError
from lowmem_db.records import ImageRecord, Size

USUAL_STEP = 64
"""Step that Stable Diffusion is usually trained with, in pixels."""


def bucket_sizes(*, resolution: int, step: int, min_side: int, max_side: int) -> list[Size]:
    """Return the buckets: for each width, the largest height that has no more pixels than the square.

    Args:
        resolution: Side length of the square in pixels.
        step: Both sides are multiples of it.
        min_side: Shortest side in pixels.
        max_side: Longest side in pixels.

    Returns:
        Heights and widths, in order of height. Of several widths with the same height only the largest is kept.
    """
    sides = range(-(-min_side // step) * step, max_side + 1, step)
    found = [(min(resolution**2 // width, max_side) // step * step, width) for width in sides]
    return sorted(_largest_of_each_height([size for size in found if size[0] >= max(min_side, step)]))


def nearest_bucket(sizes: Sequence[Size], *, width: int, height: int) -> Size:
    """Return the bucket with the nearest aspect ratio (logarithmic); among equals, the one with more pixels."""
    return min(sizes, key=lambda size: (abs(math.log(size[1] * height / (size[0] * width))), -size[0] * size[1], size))


def sizes_of(config: DataConfig, records: Sequence[ImageRecord], *, least_step: int) -> list[Size]:
    """Return the height and width that each image is trained at.

    Args:
        config: The section ``data``.
        records: The images.
        least_step: Smallest step in pixels that fits the model; the default step is a multiple of it.

    Raises:
        ConfigError: The step does not fit the model, or no size lies within the limits.
    """
    square = (config.resolution, config.resolution)
    if not config.aspect_ratio_buckets:
        return [square] * len(records)
    sizes = bucket_sizes(
        resolution=config.resolution,
        step=bucket_step(config, least_step=least_step),
        min_side=config.min_bucket_side or config.resolution // 2,
        max_side=config.max_bucket_side or config.resolution * 2,
    )
    if not sizes:
        raise ConfigError(
            f"data.min_bucket_side, data.max_bucket_side: no size of at most {config.resolution} x {config.resolution} "
            f"pixels lies between them; allowed: a minimum up to {config.resolution} and a maximum from "
            f"{config.resolution}; or leave them out"
        )
    return [nearest_bucket(sizes, width=record.width, height=record.height) for record in records]


def bucket_step(config: DataConfig, *, least_step: int) -> int:
    """Return the step of the buckets. Default: 64 pixels for 512 pixels and more, else the model's smallest step.

    Raises:
        ConfigError: ``data.bucket_step`` is not a multiple of the model's smallest step.
    """
    if config.bucket_step is not None:
        if config.bucket_step % least_step:
            raise ConfigError(
                f"data.bucket_step: {config.bucket_step} is not a multiple of {least_step}, the size in pixels of one "
                "cell in the lowest level of this model's UNet; round it, or leave it out"
            )
        return config.bucket_step
    return math.lcm(least_step, USUAL_STEP) if config.resolution >= 8 * USUAL_STEP else least_step


def share_out(count: int, sizes: Sequence[Size]) -> dict[Size, int]:
    """Distribute ``count`` images over the sizes in proportion to their frequency, at least one for each."""
    wanted = {size: count * sizes.count(size) / len(sizes) for size in sorted(set(sizes))}
    shares = {size: max(1, math.floor(share)) for size, share in wanted.items()}
    by_remainder = sorted(wanted, key=lambda size: (shares[size] - wanted[size], size))
    for size in by_remainder[: max(0, count - sum(shares.values()))]:
        shares[size] += 1
    return shares


def _largest_of_each_height(sizes: Sequence[Size]) -> list[Size]:
    widest: dict[int, int] = {}
    for height, width in sizes:
        widest[height] = max(width, widest.get(height, 0))
    return list(widest.items())
