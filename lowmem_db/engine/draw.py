"""The one loop that draws images: from conditioning through latents to pictures.

The caller decides what is in memory meanwhile: the denoiser and the decoder are each lent for as long as they are
needed, and either stay in memory or are loaded for use.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from lowmem_db import environment
from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.console import track
from lowmem_db.data.batches import PromptTable
from lowmem_db.data.crops import whole_picture_facts
from lowmem_db.errors import ConfigError, NonFiniteError
from lowmem_db.finite import is_finite
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.spaces import Codec
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.objective.low_resolution import LowResolution
from lowmem_db.out_of_memory import first_that_fits
from lowmem_db.records import Conditioning, Size
from lowmem_db.sampling.images import to_images
from lowmem_db.sampling.latents import SamplingSettings, sample_latents

_WAY_OUT = "close other programs, choose a smaller resolution or fp16, or draw on the CPU (device=cpu)"
_Lent = TypeVar("_Lent")
Lend = Callable[[], AbstractContextManager[_Lent]]
"""Returns a context with a loaded model."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """Pictures to enlarge.

    Attributes:
        pictures: The pictures in [-1, 1].
        low_resolution: How the model is told of them.
    """

    pictures: Float[Tensor, "b 3 h w"]
    low_resolution: LowResolution

    def told(self, first: int, size: Size, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Return what the model is told of as many pictures as there are generators, from number ``first`` on."""
        return self.low_resolution.told(self.pictures[first : first + len(generators)], size, generators)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Images that are drawn together.

    Attributes:
        prompts: One prompt for all images, or one for each.
        size: Height and width in pixels.
        generators: One for each image.
        at_once: Batch size. Default: all images, which is faster and needs more memory.
        negative: The prompt that guidance leads away from. Default: the empty one.
        given: The pictures to enlarge, one for each image, for a model that does that.
    """

    prompts: Sequence[str]
    size: Size
    generators: Sequence[torch.Generator]
    at_once: int | None = None
    negative: str = ""
    given: Given | None = None


@dataclass(kw_only=True)
class Thrift:
    """How little is drawn and decoded at once. What ran out of memory once is not tried again.

    Attributes:
        at_once: The most images in a batch; None: as many as a job asks for.
        tiled: Whether pictures are decoded in tiles.
        is_shared: Whether other processes compute with the same weights at the same time, so that this one must not
            begin anew when its memory runs out.
    """

    at_once: int | None = None
    tiled: bool = False
    is_shared: bool = False

    @property
    def is_reduced(self) -> bool:
        """Whether memory ran out."""
        return self.tiled or self.at_once is not None

    def batch_sizes(self, wanted: int) -> Iterator[int]:
        """Yield the batch size to try first, and smaller ones down to a single image."""
        size = min(wanted, self.at_once or wanted)
        yield size
        while size > 1 and not self.is_shared:
            size = -(-size // 2)
            self.at_once = size
            yield size


@dataclass(frozen=True, kw_only=True)
class Artist:
    """A model and its sampling settings.

    Attributes:
        model: The model; only its configurations are read.
        settings: Sampler, steps and guidance.
        objective: The run's changes to the noise process and the prediction. Default: none.
    """

    model: ModelFolder
    settings: SamplingSettings
    objective: ObjectiveConfig | None = None

    @torch.no_grad()
    def latents(self, denoiser: Denoiser, conditioning: Conditioning, job: Job) -> Float[Tensor, "b c x y"]:
        """Draw the latents of a job, on the denoiser's device.

        Args:
            denoiser: The denoiser; its mode is not changed.
            conditioning: One row for each prompt of the job, and one for the negative prompt at the end.
            job: The images to draw.

        Raises:
            ConfigError: The model enlarges pictures, and the job has none.
            NonFiniteError: They are infinite or NaN.
        """
        space, (height, width) = self.model.space, job.size
        picture = denoiser.family.describe_pictures(whole_picture_facts(job.size, len(job.prompts) + 1))
        if denoiser.family.enlarges and job.given is None:
            raise ConfigError(
                f"{self.model.name}: enlarges pictures, and there are none to enlarge; draw with "
                f"lowmem-db generate FIRST_STAGE --upscale {self.model.name}"
            )
        count = job.at_once or len(job.generators)
        with denoiser.autocast():
            told = denoiser.told(replace(conditioning, picture=picture))
            drawn = [
                sample_latents(
                    denoiser,
                    self.model.family.sampler(self.model, self.settings.sampler, self.objective),
                    self.settings,
                    _rows_for(job, told, first, count),
                    shape=(space.channels, height // space.cell, width // space.cell),
                    generators=job.generators[first : first + count],
                    tell=None if job.given is None else partial(job.given.told, first, job.size),
                )
                for first in range(0, len(job.generators), count)
            ]
        latents = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        if not is_finite(latents):
            kind = str(denoiser.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"{self.model.name}: the images of {job.prompts[0]!r} are infinite or NaN before they are decoded "
                f"(computed in {kind})"
            )
        return latents


def draw(
    artist: Artist,
    table: PromptTable,
    jobs: Sequence[Job],
    denoiser: Lend[Denoiser],
    codec: Lend[Codec],
    *,
    jobs_at_once: int | None = None,
    progress: str | None = None,
    thrift: Thrift | None = None,
) -> Iterator[list[Image]]:
    """Yield the images of each job. Out of memory, smaller batches are drawn, and pictures are decoded in tiles.

    Args:
        artist: The model and its settings.
        table: The conditioning of every prompt, negative ones included.
        jobs: The images to draw.
        denoiser: Lends the denoiser.
        codec: Lends the decoder; if both are loaded for use, only one of them is in memory at a time.
        jobs_at_once: Number of jobs drawn before they are decoded; an interruption loses them. Default: all.
        progress: Label of the progress bar. Default: no progress bar.
        thrift: What ran out of memory before; changed where memory runs out. Default: nothing did.

    Raises:
        BudgetError: There is not enough memory for a single image.
    """
    thrift = thrift or Thrift()
    waiting = iter(jobs if progress is None else track(jobs, progress, len(jobs)))
    for first in waiting:
        together = chain([first], islice(waiting, (jobs_at_once or len(jobs)) - 1))
        with denoiser() as loaded:
            latents = []
            for job in together:
                told = table.conditioning([*job.prompts, job.negative])
                latents.append(_on_host(_latents(artist, loaded, told, job, thrift)))
            del loaded
        with codec() as decoder:
            for drawn in latents:
                yield to_images(_decoded(artist, decoder, drawn, thrift))
            del decoder


def _latents(artist: Artist, denoiser: Denoiser, conditioning: Conditioning, job: Job, thrift: Thrift) -> Tensor:
    """Draw the latents of a job in the largest batches that fit; the noise of an image is the same in all of them."""
    starts = [generator.get_state() for generator in job.generators]

    def attempt(size: int) -> Tensor:
        for generator, start in zip(job.generators, starts, strict=True):
            generator.set_state(start)
        return artist.latents(denoiser, conditioning, replace(job, at_once=size))

    sizes = thrift.batch_sizes(job.at_once or len(job.generators))
    return first_that_fits(
        "drawing",
        ((f"with {size} image{'s' * (size > 1)} at a time", partial(attempt, size)) for size in sizes),
        _WAY_OUT,
    )


def _rows_for(job: Job, told: Conditioning, first: int, count: int) -> Conditioning:
    """Return the rows for some images of a job and for its negative prompt; one prompt serves all images."""
    if len(job.prompts) == 1:
        return told

    def some(rows: Tensor) -> Tensor:
        return torch.cat([rows[:-1][first : first + count], rows[-1:]])

    return replace(
        told,
        tokens={name: some(rows) for name, rows in told.tokens.items()},
        embeds={name: some(rows) for name, rows in told.embeds.items()},
        picture={name: some(rows) for name, rows in told.picture.items()},
        has_prompt=None if told.has_prompt is None else some(told.has_prompt),
    )


def _decoded(artist: Artist, decoder: Codec, latents: Tensor, thrift: Thrift) -> Tensor:
    def in_tiles() -> Tensor:
        thrift.tiled = True
        decoder.decode_in_tiles(latents.shape[-1] * artist.model.space.cell)
        return decoder.decode(latents)

    whole = ("in one piece", partial(decoder.decode, latents))
    return first_that_fits(
        "decoding", [*([] if thrift.tiled else [whole]), ("in tiles, which are blended", in_tiles)], _WAY_OUT
    )


def kept(value: _Lent) -> Lend[_Lent]:
    """Lend something that stays in memory."""

    @contextmanager
    def lend() -> Iterator[_Lent]:
        yield value

    return lend


def loaded_for_use(load: Callable[[], _Lent], device: torch.device) -> Lend[_Lent]:
    """Lend something that is loaded each time and freed afterwards.

    Args:
        load: Loads it.
        device: Its device.
    """

    @contextmanager
    def lend() -> Iterator[_Lent]:
        try:
            yield load()
        finally:
            environment.release_memory(device)

    return lend


def _on_host(latents: Tensor) -> Tensor:
    """Move latents to the host, to make room for the decoder."""
    return latents.to(CPU) if latents.device.type == "cuda" else latents
