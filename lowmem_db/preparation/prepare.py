"""The phases before training, one after the other, and their results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.console import quoted, say, warn
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
from lowmem_db.models.text_encoders import cut_prompt_warnings
from lowmem_db.out_of_memory import first_that_fits
from lowmem_db.preparation.class_images import ClassImages, class_prompt_of, prepare_class_images
from lowmem_db.preparation.encode import encode_images, encode_prompts
from lowmem_db.records import ImageRecord, Size

_Made = TypeVar("_Made")


def check_photos(config: Config) -> list[ImageRecord]:
    """Read the photos, before a model is searched; warn about those that train badly.

    Raises:
        DataError: A photo cannot be used.
    """
    found: list[ImageRecord] = []
    for number, subject in enumerate(config.subjects):
        field = "subject.instance_dir" if number == 0 else f"subject.concepts[{number - 1}].instance_dir"
        photos = scan_photos(
            subject.instance_dir, prompt=subject.instance_prompt, resolution=config.data.resolution, field=field
        )
        for message in photo_warnings(
            photos,
            resolution=config.data.resolution,
            field=field,
            aspect_ratio_buckets=config.data.aspect_ratio_buckets,
        ):
            warn(message)
        found += photos
    return found


def photos_of(config: Config, photos: list[ImageRecord], number: int) -> list[ImageRecord]:
    """Return the photos of one subject."""
    folder = config.subjects[number].instance_dir
    return [photo for photo in photos if photo.path.parent == folder]


def check_prompts(config: Config, model: ModelFolder, photos: list[ImageRecord]) -> None:
    """Warn if a prompt does not tell the model what its author expects.

    Raises:
        ConfigError: A new word, or the word that it starts as, does not fit the model's vocabulary.
    """
    for name in model.family.names_of("tokenizer") if model.words else ():
        for word in model.words:
            if word.initializer is not None:
                initial_id(model.load(name), word.initializer)
    prompts = {photo.prompt for photo in photos} | {subject.class_prompt or "" for subject in config.subjects}
    prompts |= config.prompts_drawn | set(config.prior.class_prompts)
    for message in cut_prompt_warnings(model, prompts):
        warn(message)
    if config.textual_inversion.enabled:
        return  # the new word is the identifier
    for name in model.family.names_of("tokenizer")[:1]:
        tokenizer, listed_by = model.load(name), f"lowmem-db identifiers {quoted(config.model.base)}"
        for subject in config.subjects:
            if any(word.token in subject.instance_prompt for word in model.words):
                continue  # a learned word is the identifier
            for message in identifier_warnings(subject.instance_prompt, subject.class_prompt, tokenizer, listed_by):
                warn(message)


def prepare(config: Config, model: ModelFolder, device: torch.device, photos: list[ImageRecord]) -> BatchSource:
    """Make missing class images, latent moments and text embeddings; return the batches of the run.

    Raises:
        DataError: The class images cannot be used.
    """
    sizes = sizes_of(config.data, photos, least_step=model.family.size_step(model))
    _say_sizes(config, sizes)
    size_of = {photo.path: size for photo, size in zip(photos, sizes, strict=True)}
    subjects = [photos_of(config, photos, number) for number in range(len(config.subjects))]
    of_class = _class_images_of_all(config, model, device, [[size_of[p.path] for p in own] for own in subjects])
    _check_overlap(photos, [record for records, _ in of_class for record in records], config.prior.class_dir)
    everything = [
        *((own, [size_of[photo.path] for photo in own]) for own in subjects),
        *((records, [size] * len(records)) for records, size in of_class),
    ]

    def encode(where: torch.device) -> list[list[EncodedImage]]:
        return [encode_images(config, model, where, records, each) for records, each in everything]

    encoded = _there_or_on_cpu("encoding pictures", encode, device)
    instance_images = [
        image
        for subject, images in zip(config.subjects, encoded, strict=False)  # the rest are class images
        for image in images * subject.repeats
    ]
    class_images = [image for images in encoded[len(subjects) :] for image in images]
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


def _class_images_of_all(
    config: Config, model: ModelFolder, device: torch.device, sizes: Sequence[list[Size]]
) -> list[tuple[list[ImageRecord], Size]]:
    """Return the class images of all subjects; those with the same class, folder and sizes have them in common."""
    if not config.prior.enabled:
        return []
    classes: dict[tuple[str | None, Path | None], tuple[Config, list[Size]]] = {}
    for number, (subject, own) in enumerate(zip(config.subjects, sizes, strict=True)):
        key = (subject.class_prompt, subject.class_dir)
        classes.setdefault(key, (config.of_subject(number), []))[1].extend(own)
    return [found for alone, own in classes.values() for found in _class_images(alone, model, device, own)]


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
    prompts = {path: class_prompt_of(config, index) for index, path in enumerate(images.files)}
    return [replace(record, prompt=prompts[record.path]) for record in records if record.path in prompts]


def _check_overlap(photos: list[ImageRecord], class_records: list[ImageRecord], class_dir: Path | None) -> None:
    """Refuse class images that are all photos of the subject, which would become the class; warn of some."""
    of_subject = {photo.content_key for photo in photos}
    both = sorted({record.path.name for record in class_records if record.content_key in of_subject})
    if both and all(record.content_key in of_subject for record in class_records):
        raise DataError(
            f"prior.class_dir: {class_dir} holds only photos of the subject, so it would become the class; allowed: "
            "pictures of other members of the class. Choose another folder, or leave it out to have them drawn"
        )
    if both:
        warn(f"prior.class_dir: {', '.join(both)} are also photos of the subject; remove them from {class_dir}")


def _say_sizes(config: Config, sizes: list[Size]) -> None:
    if config.data.aspect_ratio_buckets:
        counts = [f"{size[1]} x {size[0]}: {sizes.count(size)}" for size in sorted(set(sizes))]
        say(f"photos by size (width x height): {', '.join(counts)}")
