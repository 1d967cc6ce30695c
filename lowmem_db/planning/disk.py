"""The bytes that a run takes on the disk: its cache, its checkpoints, the final model, samples and records."""

from collections.abc import Mapping
from pathlib import Path

from lowmem_db.adaptation.finding import find_adaptation
from lowmem_db.config.schema import Config, Weights
from lowmem_db.models.folder import ModelFolder

_WEIGHT_BYTES: dict[Weights, int] = {"fp32": 4, "bf16_extra_bits": 3, "bf16_stochastic": 2}  # per parameter
_STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1}
_BYTES_PER_PIXEL = 2  # of a class image as PNG, rounded up
_NUM_PHOTOS = 5  # assumed
_BYTES_PER_STEP = 1_000  # rows of metrics.jsonl (measured: 260) and of TensorBoard (380)
_BYTES_OF_REPORT = 4 * 2**20  # its pictures are thumbnails, and their number is limited


def checkpoint_bytes(config: Config, model: ModelFolder, trained: Mapping[str, int]) -> int:
    """Return the most bytes that the checkpoints of a run occupy at once.

    Args:
        config: The configuration.
        model: The model.
        trained: How many parameters of each component train.
    """
    adaptation = find_adaptation(config)
    of_checkpoint = adaptation.values_in_checkpoint(model, trained) * _WEIGHT_BYTES[config.memory.weights or "fp32"]
    of_checkpoint += sum(trained.values()) * (_STATE_BYTES[config.optimizer.name] + 4 * config.ema.enabled)
    at_once = min(config.checkpointing.keep or config.training.max_train_steps, _num_checkpoints(config)) + 1
    at_once += config.evaluation.every is not None and config.evaluation.keep_best
    return int(of_checkpoint * at_once)


def final_bytes(config: Config, model: ModelFolder, trained: Mapping[str, int]) -> int:
    """Return the bytes of the final model; the arguments are those of :func:`checkpoint_bytes`."""
    return 4 * find_adaptation(config).values_in_final(model, trained)


def cache_bytes(config: Config, model: ModelFolder) -> int:
    """Return about how many bytes a run puts into its cache: class images, latents, a single file as a folder."""
    pixels, space = config.data.resolution**2, model.space
    of_latent = 2 * 4 * space.channels * pixels // space.cell**2  # mean and standard deviation in fp32
    found = num_class_images(config) * _BYTES_PER_PIXEL * pixels + num_encoded(config) * of_latent
    base = Path(config.model.base)
    return found + (base.stat().st_size if base.is_file() else 0)


def record_bytes(config: Config) -> int:
    """Return about how many bytes a run writes beside checkpoints and the final model: samples, curves, its page."""
    last = config.training.max_train_steps
    every = config.sampling.every or config.checkpointing.every or last
    drawn = (config.sampling.at_start + -(-last // every)) * len(config.sampling.prompts) * config.sampling.num_images
    of_samples = 2 * drawn * _BYTES_PER_PIXEL * config.data.resolution**2  # once more in the grids
    return of_samples + last * _BYTES_PER_STEP + _BYTES_OF_REPORT


def num_class_images(config: Config) -> int:
    """Return how many class images a run draws if none are cached; none where the user has a folder of them."""
    folder = config.prior.class_dir
    is_given = folder is not None and folder.is_dir() and any(folder.iterdir())
    return config.prior.num_class_images if config.prior.enabled and not is_given else 0


def num_encoded(config: Config) -> int:
    """Return about how many pictures a run encodes."""
    return (config.prior.num_class_images if config.prior.enabled else 0) + _NUM_PHOTOS * config.data.num_crops


def _num_checkpoints(config: Config) -> int:
    last = config.training.max_train_steps
    intervals = [config.checkpointing.every, config.evaluation.every]
    if config.sampling.prompts and config.checkpointing.keep is not None:  # else those for samples are dropped
        intervals.append(config.sampling.every)
    return len({last} | {step for every in intervals if every for step in range(every, last + 1, every)})
