"""Batches as a pure function of the seed and the step: instance samples first, then prior samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowmem_db.data.order import sample_indices
from lowmem_db.randomness import generator
from lowmem_db.records import Batch, Conditioning, ImageRecord

Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """Latent moments of one picture, a row for each of its crops, and the ``time_ids`` of :class:`Conditioning`."""

    record: ImageRecord
    mean: Float[Tensor, "crops c h w"]
    std: Float[Tensor, "crops c h w"]
    time_ids: Float[Tensor, "crops 6"]

    @property
    def shape(self) -> Shape:
        """Height and width in latent pixels."""
        return self.mean.shape[-2], self.mean.shape[-1]


@dataclass(frozen=True, kw_only=True)
class PromptTable:
    """Token ids of every prompt of a run, and their embeddings where the text encoders are frozen.

    Attributes:
        input_ids: Token ids.
        prompt_embeds: Embeddings.
        input_ids_2: Token ids for SDXL's second text encoder.
        pooled_embeds: Pooled embeddings of that.
        zeroes_empty_prompt: Whether the embeddings of the empty prompt are zeros.
    """

    input_ids: Mapping[str, Int[Tensor, " tokens"]]
    prompt_embeds: Mapping[str, Float[Tensor, "tokens dim"]] | None = None
    input_ids_2: Mapping[str, Int[Tensor, " tokens"]] | None = None
    pooled_embeds: Mapping[str, Float[Tensor, " width"]] | None = None
    zeroes_empty_prompt: bool = False

    @classmethod
    def of(cls, prompts: Sequence[str], conditioning: Conditioning, *, zeroes_empty_prompt: bool) -> "PromptTable":
        """Return the table of prompts and their rows."""

        def by_prompt(rows: Tensor | None) -> Mapping[str, Tensor] | None:
            return None if rows is None else dict(zip(prompts, rows, strict=True))

        return cls(
            input_ids=dict(zip(prompts, conditioning.input_ids, strict=True)),
            prompt_embeds=by_prompt(conditioning.prompt_embeds),
            input_ids_2=by_prompt(conditioning.input_ids_2),
            pooled_embeds=by_prompt(conditioning.pooled_embeds),
            zeroes_empty_prompt=zeroes_empty_prompt,
        )

    def conditioning(self, prompts: Sequence[str], time_ids: Float[Tensor, "b 6"] | None = None) -> Conditioning:
        """Return the rows of some prompts.

        Args:
            prompts: Prompts of the table.
            time_ids: As in :class:`Conditioning`.
        """

        def rows(values: Mapping[str, Tensor] | None) -> Tensor | None:
            return None if values is None else torch.stack([values[prompt] for prompt in prompts])

        zeroes = self.zeroes_empty_prompt and "" in prompts
        return Conditioning(
            input_ids=torch.stack([self.input_ids[prompt] for prompt in prompts]),
            prompt_embeds=rows(self.prompt_embeds),
            input_ids_2=rows(self.input_ids_2),
            pooled_embeds=rows(self.pooled_embeds),
            time_ids=time_ids,
            has_prompt=torch.tensor([prompt != "" for prompt in prompts]) if zeroes else None,
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
        """Return the batches of one optimizer step, each of pictures of one size.

        Sample ids count the photos of a step first and its class images after them, so that accumulating batches draws
        the same numbers as one large batch does.
        """
        size, count = self.train_batch_size, self.gradient_accumulation_steps
        batches = []
        for number in range(count):
            first = number * size
            shape, start = self._place_of(step * count + number)
            images = self._draw(self.instance_images, "instance_order", shape, start)
            sample_ids = [*range(first, first + size)]
            if self.class_images:
                images += self._draw(self.class_images, "class_order", shape, start)
                sample_ids += range(size * count + first, size * count + first + size)
            batches.append(self._batch(step, images, sample_ids))
        return batches

    def _place_of(self, number: int) -> tuple[Shape, int]:
        """Return the size of the pictures of a batch, and its first position in the order of those of that size.

        In an epoch of as many batches as there are photos, each size has a batch for each of its photos.
        """
        shapes = [image.shape for image in self.instance_images]
        if len(set(shapes)) == 1:
            return shapes[0], number * self.train_batch_size
        epoch, place = divmod(number, len(shapes))
        order = sample_indices(self.seed, "size_order", epoch * len(shapes), place + 1, len(shapes))
        drawn = [shapes[index] for index in order]
        before = epoch * shapes.count(drawn[-1]) + drawn[:-1].count(drawn[-1])
        return drawn[-1], before * self.train_batch_size

    def _draw(self, images: Sequence[EncodedImage], stream: str, shape: Shape, start: int) -> list[EncodedImage]:
        own = [image for image in images if image.shape == shape]
        stream = stream if len(own) == len(images) else f"{stream} {shape[0]}x{shape[1]}"
        return [own[index] for index in sample_indices(self.seed, stream, start, self.train_batch_size, len(own))]

    def _batch(self, step: int, images: list[EncodedImage], sample_ids: list[int]) -> Batch:
        crops = [self._crop(image, step, sample) for image, sample in zip(images, sample_ids, strict=True)]
        prompts = [self._prompt(image, step, sample) for image, sample in zip(images, sample_ids, strict=True)]
        of_crops = list(zip(images, crops, strict=True))
        time_ids = torch.stack([image.time_ids[crop] for image, crop in of_crops])
        return Batch(
            latent_mean=torch.stack([image.mean[crop] for image, crop in of_crops]),
            latent_std=torch.stack([image.std[crop] for image, crop in of_crops]),
            conditioning=self.prompts.conditioning(prompts, time_ids),
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
