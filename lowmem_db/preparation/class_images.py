"""Class images for prior preservation, drawn from the frozen model (arXiv:2208.12242, section 3.3).

A manifest beside the images records how they were drawn. Images are reused only if it matches, and missing ones are
added deterministically, also after a killed run. What makes other images of the same kind, such as the seed, may differ
in ``prior.class_dir``, so that the class images of one run serve the next. A folder of pictures without a manifest
belongs to the user and is used as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from lowmem_db import environment, fingerprint
from lowmem_db.adaptation.quantized import quantize
from lowmem_db.config.schema import Config
from lowmem_db.console import say, warn
from lowmem_db.data.batches import PromptTable
from lowmem_db.data.folder import MANIFEST, is_negligible
from lowmem_db.engine.draw import Artist, Job, Thrift, draw, loaded_for_use
from lowmem_db.engine.manifest import differences, write_manifest
from lowmem_db.errors import DataError, NonFiniteError
from lowmem_db.memory.drawing import load_all
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.spaces import Codec
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.models.saving import DTYPES
from lowmem_db.models.text_encoders import embed_prompts, read_otherwise
from lowmem_db.out_of_memory import first_that_fits
from lowmem_db.randomness import generator
from lowmem_db.records import Size
from lowmem_db.sampling.images import is_black
from lowmem_db.sampling.latents import SamplingSettings
from lowmem_db.storage.atomic import write_file
from lowmem_db.storage.locks import share_out_work
from lowmem_db.storage.run_folder import read_json

_FORMAT_VERSION = 1
_BLACK = "black"
_MOST_BYTES_OF_BLACK = 0.01  # per pixel; a picture takes 100 times as many
_BYTES_OF_EMPTY_PNG = 1000
_IMAGES_PER_LOAD = 32


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """Class images of one size.

    Attributes:
        folder: Their folder.
        size: Height and width in pixels.
        files: The files to use, in the order of their prompts. None if the folder is the user's own and all of its
            files are used.
    """

    folder: Path
    size: Size
    files: tuple[Path, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Set:
    """Class images to draw: their manifest, folder, size, number and seed."""

    wanted: dict[str, Any]
    folder: Path
    size: Size
    count: int
    seed: int

    def missing(self) -> list[int]:
        return [index for index in range(self.count) if not _is_drawn(_image_file(self.folder, index), self.size)]


def prepare_class_images(
    config: Config, model: ModelFolder, device: torch.device, counts: Mapping[Size, int]
) -> list[ClassImages]:
    """Draw the class images that are missing; return all of them by size.

    Args:
        config: The configuration.
        model: The model that draws them.
        device: The device to draw on.
        counts: Number of images for each size in pixels.

    Raises:
        DataError: The folder holds class images drawn with another model, prompt or sampler.
        NonFiniteError: An image is infinite or NaN; those drawn before it are kept.
    """
    own = config.prior.class_dir
    if own is not None and _is_users_own(own):
        say(f"class images: using the pictures in {own} as they are")
        return [ClassImages(folder=own, size=size, files=None) for size in counts]
    sets = [_set(config, model, device, size, count) for size, count in counts.items()]
    for group in sets:
        _check_manifest(group)
        _remove_damaged(group)
    to_draw = [group for group in sets if group.missing()]
    for group in sets:
        if group in to_draw:
            say(f"class images: drawing {len(group.missing())} of {group.count} into {group.folder}")
        else:
            say(f"class images: found all {group.count} in {group.folder}")
    if to_draw:
        _draw(config, model, device, to_draw)
    return [
        ClassImages(
            folder=group.folder,
            size=group.size,
            files=tuple(_image_file(group.folder, index) for index in range(group.count)),
        )
        for group in sets
    ]


def class_prompts(config: Config) -> tuple[str, ...]:
    """Return the prompts that class images have in turn, the class prompt first."""
    return (str(config.subject.class_prompt), *config.prior.class_prompts)


def class_prompt_of(config: Config, index: int) -> str:
    """Return the prompt of the class image with this number."""
    prompts = class_prompts(config)
    return prompts[index % len(prompts)]


def _set(config: Config, model: ModelFolder, device: torch.device, size: Size, count: int) -> _Set:
    is_square = size == (config.data.resolution, config.data.resolution)
    wanted = _manifest(config, model, device, size[0] if is_square else list(size))
    if config.prior.class_dir is None:
        folder = config.cache_dir / "class_images" / fingerprint.of_values(wanted)
    else:
        folder = config.prior.class_dir if is_square else config.prior.class_dir / f"{size[1]}x{size[0]}"
    seed = _manifest_of(folder).get("seed", config.seed)
    return _Set(wanted=wanted, folder=folder, size=size, count=count, seed=seed)


def _manifest(config: Config, model: ModelFolder, device: torch.device, resolution: int | list[int]) -> dict[str, Any]:
    read = read_otherwise(model)
    return {
        "format_version": _FORMAT_VERSION,
        "model": model.whole_key,
        "prompt": list(class_prompts(config)) if config.prior.class_prompts else config.subject.class_prompt,
        **asdict(_settings(config)),
        "resolution": resolution,
        "precision": _precision(config, device),
        "sample_batch_size": config.prior.sample_batch_size,
        "seed": config.seed,
        **({"clip_skip_and_chunks": read} if read else {}),
        **({"decoded_in_tiles": True} if config.memory.tiled_preparation else {}),
    }


def _precision(config: Config, device: torch.device) -> str:
    """Return the type of the frozen UNet; a LoRA run with quantized weights draws with them too, to save memory."""
    if config.lora.base_weights in {"int8", "nf4"}:
        return str(config.lora.base_weights)
    return config.prior.precision or ("fp16" if device.type == "cuda" else "fp32")


def _settings(config: Config) -> SamplingSettings:
    return SamplingSettings(
        sampler=config.prior.sampler,
        num_inference_steps=config.prior.num_inference_steps,
        guidance_scale=config.prior.guidance_scale,
    )


def _is_users_own(folder: Path) -> bool:
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return False
    entries = [entry for entry in folder.iterdir() if not is_negligible(entry)]
    return any(not (entry / MANIFEST).is_file() for entry in entries)


def _manifest_of(folder: Path) -> dict[str, Any]:
    found = read_json(folder / MANIFEST)
    return found if isinstance(found, dict) else {}


def _check_manifest(group: _Set) -> None:
    """Refuse images of another kind; say what else differs.

    Raises:
        DataError: The images were drawn with another model, prompt or sampler.
    """
    found = differences(group.folder, group.wanted)
    alike = {name: pair for name, pair in found.items() if _is_alike(name, *pair)}
    if other := {name: pair for name, pair in found.items() if name not in alike}:
        raise DataError(
            f"prior.class_dir: {group.folder} holds class images drawn with other settings ({_in_words(other)}); "
            "choose another folder, delete this one, or leave prior.class_dir out"
        )
    if alike:
        say(f"class images: those of an earlier run serve this one too ({_in_words(alike)})")


def _is_alike(name: str, before: object, now: object) -> bool:
    """Return whether images that differ in a setting are still of the same kind."""
    if name == "precision":
        return {before, now} <= DTYPES.keys()
    if name == "decoded_in_tiles":
        return {before, now} <= {True, None}
    return name in {"seed", "sample_batch_size"} and type(before) is int


def _in_words(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} is {before!r} instead of {now!r}" for name, (before, now) in differing.items())


def _draw(config: Config, model: ModelFolder, device: torch.device, sets: Sequence[_Set]) -> None:
    """Draw the missing images of some sets; the denoiser and the decoder are in memory one after the other."""
    dtype = DTYPES.get(sets[0].wanted["precision"], torch.float16)
    table = _embed(config, model, device, dtype)
    environment.release_memory(device)
    for group in sets:
        if not (group.folder / MANIFEST).is_file():
            write_manifest(group.folder, group.wanted)
    per_part, thrift = _images_per_part(config), Thrift()
    parts = [(group, first) for group in sets for first in range(0, group.count, per_part)]

    def draw_part(group: _Set, first: int) -> None:
        missing = [index for index in group.missing() if first <= index < first + per_part]
        batches = _whole_batches(missing, config.prior.sample_batch_size)
        drawn = draw(
            class_artist(config, model),
            table,
            [class_job(config, indices, group.size, seed=group.seed) for indices in batches],
            loaded_for_use(partial(load_frozen_denoiser, config, model, device, dtype), device),
            loaded_for_use(partial(load_class_decoder, config, model, device, dtype), device),
            progress=f"class images {first} to {min(first + per_part, group.count) - 1}",
            thrift=thrift,
        )
        for indices, images in zip(batches, drawn, strict=True):
            _save_missing(group, indices, images)

    try:
        share_out_work((_lock_file(config, group, first), partial(draw_part, group, first)) for group, first in parts)
    except NonFiniteError as error:
        narrow = "set prior.precision=fp32, or name an autoencoder that computes in fp16 in model.vae"
        whole = "download the model again, or use another"
        raise NonFiniteError(f"class images: {error}; {whole if dtype == torch.float32 else narrow}") from error


def load_frozen_denoiser(config: Config, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """Load the denoiser that draws class images, in 8 or 4 bits if a LoRA run quantizes its frozen weights."""
    family, kind = model.family, config.lora.base_weights
    if kind == "int8" or kind == "nf4":
        module = model.load(family.denoiser, device if device.type == "meta" else CPU, dtype)
        quantize([module], kind, dtype)
        nn.Module.to(module, device)
        return Denoiser(family, {family.denoiser: module})
    streamed = bool(config.memory.stream_weights)
    load = partial(model.load, dtype=dtype)
    return Denoiser(family, load_all(family, (family.denoiser,), load, device, streamed=streamed))


def load_class_decoder(config: Config, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> Codec:
    """Load the decoder of class images."""
    codec = model.space.load(device, dtype)
    if config.memory.stream_weights:
        codec.drop_encoder()
    if config.memory.tiled_preparation:
        codec.decode_in_tiles(config.data.resolution)
    return codec


def load_class_text_encoders(
    config: Config, model: ModelFolder, device: torch.device, dtype: torch.dtype
) -> Mapping[str, nn.Module]:
    """Load the text encoders that embed the class prompt."""
    streamed = bool(config.memory.stream_weights)
    load = partial(model.load, dtype=dtype)
    return load_all(model.family, model.family.text_encoders, load, device, streamed=streamed)


def class_artist(config: Config, model: ModelFolder) -> Artist:
    """Return the artist for class images: the model before training."""
    return Artist(model=model, settings=_settings(config))


def class_job(config: Config, indices: Sequence[int], size: Size, *, seed: int | None = None) -> Job:
    """Return a job for the class images with these indices, each with its own noise.

    Args:
        config: The configuration.
        indices: Numbers of the images.
        size: Height and width in pixels.
        seed: Seed of the noise. Default: that of the run.
    """
    height, width = size
    stream = "class_images" if height == width else f"class_images {width}x{height}"
    generators = [generator(config.seed if seed is None else seed, stream, index) for index in indices]
    prompts = [class_prompt_of(config, index) for index in indices]
    return Job(prompts=prompts if config.prior.class_prompts else prompts[:1], size=size, generators=generators)


def _save_missing(group: _Set, indices: Sequence[int], images: Sequence[Image]) -> None:
    missing = group.missing()
    for index, image in zip(indices, images, strict=True):
        if index in missing:
            _save(_image_file(group.folder, index), image)


def _save(file: Path, image: Image) -> None:
    """Save an image; a black one is marked, so that it is not taken for one of an older version, made of NaN."""
    mark = PngInfo()
    if is_black(image):
        warn(f"{file}: is completely black, although all values are finite; look at the class images")
        mark.add_text(_BLACK, "drawn from finite values")
    write_file(file, lambda path: image.save(path, format="PNG", pnginfo=mark))


def _is_drawn(file: Path, size: Size) -> bool:
    """Return whether an image exists, and is not black because its values were NaN."""
    try:
        if file.stat().st_size > size[0] * size[1] * _MOST_BYTES_OF_BLACK + _BYTES_OF_EMPTY_PNG:
            return True
        with PIL.Image.open(file) as image:
            return _BLACK in image.info or not is_black(image)
    except FileNotFoundError:
        return False
    except (OSError, SyntaxError):
        return file.is_file()  # cannot be read: reading the folder names it


def _remove_damaged(group: _Set) -> None:
    """Remove images with a flipped bit, which the checksums in a PNG betray: they are drawn again."""
    for index in range(group.count):
        file = _image_file(group.folder, index)
        try:
            with PIL.Image.open(file) as image:
                image.verify()
        except (FileNotFoundError, PermissionError):
            continue  # is to be drawn, or cannot be read: reading the folder names it
        except (OSError, SyntaxError, ValueError) as error:
            warn(f"{file}: is damaged and will be drawn again ({error})")
            file.unlink(missing_ok=True)


def _embed(config: Config, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> PromptTable:
    """Return the embeddings of the class prompts and of the empty prompt; the CPU computes them in fp32."""

    def on(where: torch.device, in_dtype: torch.dtype) -> PromptTable:
        text_encoders = load_class_text_encoders(config, model, where, in_dtype)
        return embed_prompts(model, text_encoders, [*class_prompts(config), ""])

    places = [(device, dtype)] if device.type == "cpu" else [(device, dtype), (CPU, torch.float32)]
    attempts = [(f"on {where}", partial(on, where, in_dtype)) for where, in_dtype in places]
    return first_that_fits("encoding the class prompt", attempts, "close other programs")


def _images_per_part(config: Config) -> int:
    """Return how many images are drawn before they are decoded and saved; a killed run loses so many at most.

    With several processes there is a part for each of them.
    """
    batch_size = config.prior.sample_batch_size
    batches = ceil(config.prior.num_class_images / batch_size)
    for_each = ceil(batches / config.distributed.num_processes)
    return min(max(1, _IMAGES_PER_LOAD // batch_size), for_each) * batch_size


def _lock_file(config: Config, group: _Set, first: int) -> Path:
    key = fingerprint.of_values(str(group.folder.absolute()))
    return config.cache_dir / ".locks" / f"class-images-{key[:16]}-{first:05d}.lock"


def _whole_batches(missing: Iterable[int], size: int) -> list[list[int]]:
    """Return the batches of consecutive images that contain a missing one.

    Batches are always drawn whole, because the last bits of an image depend on its batch size.
    """
    firsts = sorted({index - index % size for index in missing})
    return [list(range(first, first + size)) for first in firsts]


def _image_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"
