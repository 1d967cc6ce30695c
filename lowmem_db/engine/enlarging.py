"""The later stages of a cascade: they enlarge what the stage before has drawn, one model in memory at a time."""

import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.engine.draw import Artist, Given, Job, draw, loaded_for_use
from lowmem_db.engine.source import ImageSource, find_source, streamed_if_needed
from lowmem_db.errors import DataError
from lowmem_db.objective.low_resolution import LowResolution
from lowmem_db.randomness import generator
from lowmem_db.sampling.images import to_pixels
from lowmem_db.sampling.latents import SamplingSettings
from lowmem_db.storage.places import EMBEDDED_GUIDANCE

STREAM = "enlarged"
_GUIDANCE = 4.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A super-resolution model.

    Attributes:
        source: The model.
        low_resolution: How it is told of the pictures that it enlarges: as it was trained.
    """

    source: ImageSource
    low_resolution: LowResolution

    @property
    def size(self) -> int:
        """Height and width of what it draws, in pixels."""
        return self.source.resolution

    @property
    def settings(self) -> SamplingSettings:
        """Those of diffusers' pipeline, but for the guidance of the small model in this package."""
        guidance = EMBEDDED_GUIDANCE if self.source.is_embedded else _GUIDANCE
        return SamplingSettings(sampler="ddpm", num_inference_steps=50, guidance_scale=guidance)

    def prompts(self, prompts: Sequence[str], config: Config | None) -> list[str]:
        """Return what it is told for the prompts of the first stage.

        A model that was not fine-tuned is not told the identifier, which it does not know; in the place of a learned
        word it is told the word that this began as.

        Args:
            prompts: The prompts.
            config: The run of the first stage, or None.
        """
        if self.source.run_config is not None or config is None:
            return list(prompts)
        own, of_class = config.subject.instance_prompt, config.subject.class_prompt
        if config.textual_inversion.enabled:
            found = [each.replace(config.textual_inversion.token, str(config.initializer)) for each in prompts]
        elif of_class is not None:
            found = [without_identifier(each, own, of_class) for each in prompts]
        else:
            return list(prompts)
        if found != list(prompts):
            say(f"{self.source.model.name} is not fine-tuned, and is told {found[0]!r} without the identifier")
        return found

    def enlarge(
        self,
        images: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        *,
        seed: int,
        number: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> list[list[Image.Image]]:
        """Enlarge the images of each prompt.

        Args:
            images: The images of each prompt.
            prompts: What the model is told.
            seed: Seed of the noise.
            number: Number of the stage, from 1.
            device: Device to compute on.
            dtype: Type to compute in.
        """

        def enlarged(source: ImageSource) -> list[list[Image.Image]]:
            table = source.embed([*prompts, ""], device, dtype)
            denoiser = loaded_for_use(partial(source.load_denoiser, device, dtype), device)
            codec = loaded_for_use(partial(source.model.space.load, device), device)
            jobs = self._jobs(images, prompts, seed, number)
            return list(draw(artist, table, jobs, denoiser, codec, progress=f"enlarging to {self.size} px"))

        artist = Artist(model=self.source.model, settings=self.settings, objective=self.source.objective)
        return streamed_if_needed(self.source, enlarged, device)

    def _jobs(
        self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], seed: int, number: int
    ) -> list[Job]:
        return [
            Job(
                prompts=[prompt],
                size=(self.size, self.size),
                generators=[generator(seed, f"{STREAM} {number}", index) for index in range(len(small))],
                at_once=1,
                given=Given(pictures=to_pixels(small), low_resolution=self.low_resolution),
            )
            for prompt, small in zip(prompts, images, strict=True)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return how it draws, for ``images.json``."""
        own = {"resolution": self.size, "noise_augmentation": self.low_resolution.variance}
        return own | {"noise_level": self.low_resolution.level} | asdict(self.settings)


def find_stages(sources: Sequence[str], *, stream_weights: bool | None = None) -> list[Stage]:
    """Find super-resolution models.

    Args:
        sources: As in :func:`find_source`.
        stream_weights: As in :class:`ImageSource`.

    Raises:
        DataError: One of them does not enlarge pictures.
        ModelError: One does not exist.
    """
    found = []
    for name in sources:
        source = replace(find_source(name), stream_weights=stream_weights)
        low_resolution = source.model.family.low_resolution(source.model, source.run_config)
        if low_resolution is None:
            raise DataError(
                f"--upscale: {name} is {source.model.family.name}, which does not enlarge pictures; allowed: a "
                "super-resolution model, such as DeepFloyd IF's second stage"
            )
        found.append(Stage(source=source, low_resolution=low_resolution))
    return found


def without_identifier(prompt: str, instance_prompt: str, class_prompt: str) -> str:
    """Return a prompt without the words of the instance prompt that the class prompt does not have."""
    of_class = {_bare(word) for word in class_prompt.split()}
    identifier = {_bare(word) for word in instance_prompt.split()} - of_class
    return " ".join(word for word in prompt.split() if _bare(word) not in identifier)


def _bare(word: str) -> str:
    return word.strip(string.punctuation).casefold()
