"""The one loop that draws images: from what a model is told through latents to pictures.

What is in memory while it draws is a choice: the denoiser and what decodes are each lent for as long as they are
needed, from memory or from disk.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
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
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.spaces import Codec
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.records import Conditioning, Size
from lowmem_db.sampling.images import to_images
from lowmem_db.sampling.latents import SamplingSettings, sample_latents

_Lent = TypeVar("_Lent")
Lend = Callable[[], AbstractContextManager[_Lent]]
"""Returns a context with something in memory."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Images that are drawn together.

    Attributes:
        prompts: One prompt for all images, or one for each.
        size: Height and width in pixels.
        generators: One for each image.
        at_once: So many images at a time; None: all, which is faster and needs more memory.
    """

    prompts: Sequence[str]
    size: Size
    generators: Sequence[torch.Generator]
    at_once: int | None = None


@dataclass(frozen=True, kw_only=True)
class Artist:
    """How a model draws.

    Attributes:
        model: The model; its configurations are enough.
        settings: Sampler, steps and guidance.
        objective: What a run has changed about its noise and its prediction; None: nothing.
    """

    model: ModelFolder
    settings: SamplingSettings
    objective: ObjectiveConfig | None = None

    @torch.no_grad()
    def latents(self, denoiser: Denoiser, conditioning: Conditioning, job: Job) -> Float[Tensor, "b c x y"]:
        """Draw the latents of a job, on the denoiser's device.

        Args:
            denoiser: Predicts; its mode is not changed.
            conditioning: A row for each prompt of the job, and one for the empty prompt at the end.
            job: What is drawn.
        """
        space, (height, width) = self.model.space, job.size
        picture = denoiser.family.describe_pictures(whole_picture_facts(job.size, len(job.prompts) + 1))
        count = job.at_once or len(job.generators)
        with denoiser.autocast():
            told = denoiser.told(replace(conditioning, picture=picture))
            drawn = [
                sample_latents(
                    denoiser,
                    self.model.family.sampler(self.model, self.settings.sampler, self.objective),
                    self.settings,
                    told,
                    shape=(space.channels, height // space.cell, width // space.cell),
                    generators=job.generators[first : first + count],
                )
                for first in range(0, len(job.generators), count)
            ]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def draw(
    artist: Artist,
    table: PromptTable,
    jobs: Sequence[Job],
    denoiser: Lend[Denoiser],
    codec: Lend[Codec],
    *,
    jobs_at_once: int | None = None,
    progress: str | None = None,
) -> Iterator[list[Image]]:
    """Yield the images of each job.

    Args:
        artist: Draws.
        table: What the model is told of every prompt, the empty one included.
        jobs: What is drawn.
        denoiser: Lends the denoiser.
        codec: Lends what decodes; where both are loaded for use, they are in memory one after the other.
        jobs_at_once: So many jobs before anything is decoded; None: all. What is killed loses them.
        progress: What is shown while it draws; None: nothing.
    """
    waiting = iter(jobs if progress is None else track(jobs, progress, len(jobs)))
    for first in waiting:
        together = chain([first], islice(waiting, (jobs_at_once or len(jobs)) - 1))
        with denoiser() as loaded:
            latents = [
                _on_host(artist.latents(loaded, table.conditioning([*job.prompts, ""]), job)) for job in together
            ]
            del loaded
        with codec() as decoder:
            for drawn in latents:
                yield to_images(decoder.decode(drawn))
            del decoder


def kept(value: _Lent) -> Lend[_Lent]:
    """Lend what stays in memory."""

    @contextmanager
    def lend() -> Iterator[_Lent]:
        yield value

    return lend


def loaded_for_use(load: Callable[[], _Lent], device: torch.device) -> Lend[_Lent]:
    """Lend what is loaded each time, and freed afterwards.

    Args:
        load: Loads it.
        device: Where it is.
    """

    @contextmanager
    def lend() -> Iterator[_Lent]:
        try:
            yield load()
        finally:
            environment.release_memory(device)

    return lend


def _on_host(latents: Tensor) -> Tensor:
    """Move latents out of the way of what decodes them."""
    return latents.to(CPU) if latents.device.type == "cuda" else latents
