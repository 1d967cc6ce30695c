"""Batches as a pure function of the seed and the step: instance samples first, then prior samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowmem_db.data.order import sample_indices
from lowmem_db.randomness import generator
from lowmem_db.records import Batch, Conditioning, ImageRecord


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """Latent moments of one picture, a row for each of its crops."""

    record: ImageRecord
    mean: Float[Tensor, "crops c h w"]
    std: Float[Tensor, "crops c h w"]


@dataclass(frozen=True, kw_only=True)
class PromptTable:
    """Token ids of every prompt of a run, and their embeddings where the text encoder is frozen."""

    input_ids: Mapping[str, Int[Tensor, " tokens"]]
    prompt_embeds: Mapping[str, Float[Tensor, "tokens dim"]] | None = None

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Return the rows of some prompts."""
        embeds = self.prompt_embeds
        return Conditioning(
            input_ids=torch.stack([self.input_ids[prompt] for prompt in prompts]),
            prompt_embeds=None if embeds is None else torch.stack([embeds[prompt] for prompt in prompts]),
        )


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """All batches of a run.

    Attributes:
        instance_images: The photos.
        class_images: The class images; empty without prior preservation.
        prompts: Conditioning of every prompt, the empty one included.
        seed: The run's seed.
        train_batch_size: Photos in a batch.
        gradient_accumulation_steps: Batches in a step.
        conditioning_dropout: Share of samples that get the empty prompt.
    """

    instance_images: Sequence[EncodedImage]
    class_images: Sequence[EncodedImage]
    prompts: PromptTable
    seed: int
    train_batch_size: int
    gradient_accumulation_steps: int
    conditioning_dropout: float = 0.0

    def batches_at(self, step: int) -> list[Batch]:
        """Return the batches of one optimizer step.

        Sample ids count the photos of a step first and its class images after them, so that accumulating batches draws
        the same numbers as one large batch does.
        """
        count = self.train_batch_size * self.gradient_accumulation_steps
        instance = self._draw(self.instance_images, "instance_order", step, count)
        prior = self._draw(self.class_images, "class_order", step, count) if self.class_images else []
        size = self.train_batch_size
        return [
            self._batch(
                step,
                instance[first : first + size] + prior[first : first + size],
                [*range(first, first + size), *(range(count + first, count + first + size) if prior else ())],
            )
            for first in range(0, count, size)
        ]

    def _draw(self, images: Sequence[EncodedImage], stream: str, step: int, count: int) -> list[EncodedImage]:
        return [images[index] for index in sample_indices(self.seed, stream, step * count, count, len(images))]

    def _batch(self, step: int, images: list[EncodedImage], sample_ids: list[int]) -> Batch:
        crops = [self._crop(image, step, sample) for image, sample in zip(images, sample_ids, strict=True)]
        prompts = [self._prompt(image, step, sample) for image, sample in zip(images, sample_ids, strict=True)]
        return Batch(
            latent_mean=torch.stack([image.mean[crop] for image, crop in zip(images, crops, strict=True)]),
            latent_std=torch.stack([image.std[crop] for image, crop in zip(images, crops, strict=True)]),
            conditioning=self.prompts.conditioning(prompts),
            sample_ids=torch.tensor(sample_ids),
            num_instance=self.train_batch_size,
            sources=tuple(image.record.path.name for image in images),
        )

    def _crop(self, image: EncodedImage, step: int, sample: int) -> int:
        return int(torch.randint(len(image.mean), (), generator=generator(self.seed, "crop", step, sample)))

    def _prompt(self, image: EncodedImage, step: int, sample: int) -> str:
        if self.conditioning_dropout == 0:
            return image.record.prompt
        draw = torch.rand((), generator=generator(self.seed, "conditioning_dropout", step, sample))
        return "" if draw < self.conditioning_dropout else image.record.prompt
