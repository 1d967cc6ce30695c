"""The phases before training, one after the other, and their results."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeVar

import torch

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.console import say, warn
from lowmem_db.data.batches import BatchSource, EncodedImage
from lowmem_db.data.buckets import share_out, sizes_of
from lowmem_db.data.identifiers import identifier_warnings
from lowmem_db.data.photos import photo_warnings, scan_photos
from lowmem_db.data.tags import caption_variants, varies
from lowmem_db.data.templates import templates_of
from lowmem_db.errors import DataError
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.models.new_words import initial_id
from lowmem_db.models.text_encoders import num_cut_tokens
from lowmem_db.out_of_memory import first_that_fits
from lowmem_db.preparation.class_images import ClassImages, prepare_class_images
from lowmem_db.preparation.encode import encode_images, encode_prompts
from lowmem_db.records import ImageRecord, Size

_Made = TypeVar("_Made")


def check_photos(config: Config) -> list[ImageRecord]:
    """Read the photos, before a model is searched; warn about those that train badly.

    Raises:
        DataError: A photo cannot be used.
    """
    photos = scan_photos(
        config.subject.instance_dir,
        prompt=config.subject.instance_prompt,
        resolution=config.data.resolution,
        field="subject.instance_dir",
    )
    for message in photo_warnings(
        photos,
        resolution=config.data.resolution,
        field="subject.instance_dir",
        aspect_ratio_buckets=config.data.aspect_ratio_buckets,
    ):
        warn(message)
    return photos


def check_prompts(config: Config, model: ModelFolder, photos: list[ImageRecord]) -> None:
    """Warn if a prompt does not tell the model what its author expects.

    Raises:
        ConfigError: A new word, or the word that it starts as, does not fit the model's vocabulary.
    """
    for name in model.family.names_of("tokenizer") if model.words else ():
        for word in model.words:
            if word.initializer is not None:
                initial_id(model.load(name), word.initializer)
    prompts = sorted({photo.prompt for photo in photos} | {config.subject.class_prompt or ""} | config.prompts_drawn)
    for name in model.family.names_of("tokenizer")[:1]:  # all of them read the same words
        tokenizer = model.load(name)
        for prompt in prompts:
            if cut := num_cut_tokens(tokenizer, prompt, model.family.reading.num_chunks):
                read = tokenizer.model_max_length * model.family.reading.num_chunks
                needed = model.family.reading.num_chunks - (-cut // (tokenizer.model_max_length - 2))
                warn(
                    f"the model reads {read} tokens and ignores the last {cut} of {prompt!r}; to read all of it, set "
                    f"model.prompt_chunks={needed}"
                )
        if config.textual_inversion.enabled:
            continue  # the new word is the identifier
        for message in identifier_warnings(config.subject.instance_prompt, config.subject.class_prompt, tokenizer):
            warn(message)


def prepare(config: Config, model: ModelFolder, device: torch.device, photos: list[ImageRecord]) -> BatchSource:
    """Make missing class images, latent moments and text embeddings; return the batches of the run.

    Raises:
        DataError: The class images cannot be used.
    """
    sizes = sizes_of(config.data, photos, least_step=model.family.size_step(model))
    _say_sizes(config, sizes)
    class_pictures = _class_images(config, model, device, sizes) if config.prior.enabled else []
    everything = [(photos, sizes), *((records, [size] * len(records)) for records, size in class_pictures)]

    def encode(where: torch.device) -> list[list[EncodedImage]]:
        return [encode_images(config, model, where, records, each) for records, each in everything]

    instance_images, *of_classes = _there_or_on_cpu("encoding pictures", encode, device)
    class_images = [image for images in of_classes for image in images]
    environment.release_memory(device)
    class_records = [image.record for image in class_images]
    variants = {photo.prompt: caption_variants(photo.prompt, config.data, config.seed) for photo in photos}
    if templates := templates_of(config):
        variants[config.subject.instance_prompt] = templates
    prompts = {record.prompt for record in [*photos, *class_records]} | config.prompts_drawn
    prompts |= {variant for found in variants.values() for variant in found}
    table = _there_or_on_cpu("encoding prompts", lambda where: encode_prompts(config, model, where, prompts), device)
    environment.release_memory(device)
    return BatchSource(
        instance_images=repeated(instance_images, config.data.repeats),
        class_images=class_images,
        prompts=table,
        seed=config.seed,
        train_batch_size=config.training.train_batch_size,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        conditioning_dropout=config.objective.conditioning_dropout,
        caption_variants=variants if templates or varies(config.data) else {},
    )


def _there_or_on_cpu(what: str, make: Callable[[torch.device], _Made], device: torch.device) -> _Made:
    """Compute on a device, and what does not fit there on the CPU; what was cached before is not made again."""
    places = [device] if device.type == "cpu" else [device, CPU]
    attempts = [(f"on {where}", partial(make, where)) for where in places]
    return first_that_fits(what, attempts, "free memory, or lower data.resolution")


def repeated(images: Sequence[EncodedImage], repeats: Mapping[str, int]) -> list[EncodedImage]:
    """Return images as often as they are to be seen in an epoch.

    Args:
        images: The photos.
        repeats: Counts by shell patterns of file names; the first pattern that matches counts.

    Raises:
        DataError: A pattern matches no photo.
    """
    names = [image.record.path.name for image in images]
    for pattern in repeats:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DataError(
                f"data.repeats: {pattern!r} matches no photo; allowed: shell patterns of {', '.join(names[:5])}"
                f"{', ...' * (len(names) > 5)}"
            )
    counts = [next((count for pattern, count in repeats.items() if fnmatchcase(name, pattern)), 1) for name in names]
    return [image for image, count in zip(images, counts, strict=True) for _ in range(count)]


def _class_images(
    config: Config, model: ModelFolder, device: torch.device, sizes: list[Size]
) -> list[tuple[list[ImageRecord], Size]]:
    """Return class images for every photo size, in proportion; the user's own pictures are used for each size."""
    counts = share_out(config.prior.num_class_images, sizes)
    prepared = prepare_class_images(config, model, device, counts)
    environment.release_memory(device)
    return [(_class_records(config, images), images.size) for images in prepared]


def _class_records(config: Config, images: ClassImages) -> list[ImageRecord]:
    records = scan_photos(
        images.folder,
        prompt=str(config.subject.class_prompt),
        resolution=min(images.size),
        field="prior.class_dir",
    )
    if images.files is None:
        if len(records) < config.prior.num_class_images:
            say(f"class images: {images.folder} holds only {len(records)} of {config.prior.num_class_images} asked for")
        return records[: config.prior.num_class_images]
    return [record for record in records if record.path in set(images.files)]


def _say_sizes(config: Config, sizes: list[Size]) -> None:
    if config.data.aspect_ratio_buckets:
        counts = [f"{size[1]} x {size[0]}: {sizes.count(size)}" for size in sorted(set(sizes))]
        say(f"photos by size (width x height): {', '.join(counts)}")
