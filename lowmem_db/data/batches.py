"""Batches as a pure function of the seed and the step: instance samples first, then prior samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from lowmem_db.data.order import sample_indices
from lowmem_db.randomness import generator
from lowmem_db.records import Batch, Conditioning, ImageRecord

Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """Latent moments of one image, with one row per crop.

    Attributes:
        record: The image.
        mean: Mean of each crop.
        std: Standard deviation of each crop.
        picture: Conditioning on each crop, as in :class:`Conditioning`.
        has_mirrored: Whether the second half of the rows are the crops of the first half, mirrored.
    """

    record: ImageRecord
    mean: Float[Tensor, "crops c h w"]
    std: Float[Tensor, "crops c h w"]
    picture: Mapping[str, Shaped[Tensor, "crops ..."]] = field(default_factory=dict)
    has_mirrored: bool = False

    @property
    def num_crops(self) -> int:
        """Number of crops, not counting mirrored ones."""
        return len(self.mean) // (2 if self.has_mirrored else 1)

    @property
    def shape(self) -> Shape:
        """Height and width in latent pixels."""
        return self.mean.shape[-2], self.mean.shape[-1]


@dataclass(frozen=True, kw_only=True)
class PromptTable:
    """Tokens and embeddings of all prompts of a run.

    Attributes:
        tokens: Tokens of each prompt, by name.
        embeds: Embeddings of each prompt, by name. None if the text encoders train.
        zeroes_empty_prompt: Whether the embeddings of the empty prompt are zeros.
    """

    tokens: Mapping[str, Mapping[str, Tensor]]
    embeds: Mapping[str, Mapping[str, Tensor]] | None = None
    zeroes_empty_prompt: bool = False

    @classmethod
    def of(cls, prompts: Sequence[str], tokens: Mapping[str, Tensor], *, zeroes_empty_prompt: bool) -> "PromptTable":
        """Build a table from prompts and their rows of tokens, without embeddings."""
        return cls(tokens=_by_prompt(prompts, tokens), zeroes_empty_prompt=zeroes_empty_prompt)

    def with_embeds(self, prompts: Sequence[str], embeds: Mapping[str, Tensor]) -> "PromptTable":
        """Return a copy of the table with embeddings for all its prompts."""
        return replace(self, embeds=_by_prompt(prompts, embeds))

    def conditioning(self, prompts: Sequence[str], picture: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Return the rows of some prompts.

        Args:
            prompts: Prompts in the table.
            picture: Conditioning on the images, one row per prompt.
        """
        zeroes = self.zeroes_empty_prompt and "" in prompts
        return Conditioning(
            tokens=_rows(self.tokens, prompts),
            embeds={} if self.embeds is None else _rows(self.embeds, prompts),
            picture=picture or {},
            has_prompt=torch.tensor([prompt != "" for prompt in prompts]) if zeroes else None,
        )


def _by_prompt(prompts: Sequence[str], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {prompt: {name: rows[index] for name, rows in tensors.items()} for index, prompt in enumerate(prompts)}


def _rows(table: Mapping[str, Mapping[str, Tensor]], prompts: Sequence[str]) -> dict[str, Tensor]:
    return {name: torch.stack([table[prompt][name] for prompt in prompts]) for name in table[prompts[0]]}


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """All batches of a run.

    Attributes:
        instance_images: The photos.
        class_images: The class images; empty without prior preservation.
        prompts: Conditioning for every prompt, including the empty one.
        seed: The run's seed.
        train_batch_size: Photos per batch.
        gradient_accumulation_steps: Batches per step.
        conditioning_dropout: Fraction of samples that get the empty prompt.
        caption_variants: Variants of the photos' prompts; each sample draws one. Prompts without any stay as they are.
        rank: Which of the processes that take the batches of a step in turn this one is.
        num_processes: How many there are.
    """

    instance_images: Sequence[EncodedImage]
    class_images: Sequence[EncodedImage]
    prompts: PromptTable
    seed: int
    train_batch_size: int
    gradient_accumulation_steps: int
    conditioning_dropout: float = 0.0
    caption_variants: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rank: int = 0
    num_processes: int = 1

    def of_rank(self, rank: int, num_processes: int) -> "BatchSource":
        """Return one process's share of a source with as many more batches per step."""
        return replace(
            self,
            gradient_accumulation_steps=self.gradient_accumulation_steps * num_processes,
            rank=rank,
            num_processes=num_processes,
        )

    def in_parts(self, count: int) -> "BatchSource":
        """Return a source whose batches are parts of these, with the same samples and random numbers.

        Args:
            count: Parts of each batch; it divides the batch size, and all photos have the same size.
        """
        return replace(
            self,
            train_batch_size=self.train_batch_size // count,
            gradient_accumulation_steps=self.gradient_accumulation_steps * count,
        )

    def batches_at(self, step: int) -> list[Batch]:
        """Return this process's batches of one optimizer step; all images in a batch have the same size.

        Sample ids number the photos of a step first and its class images after them, so that accumulated batches draw
        the same random numbers as one large batch.
        """
        size, count = self.train_batch_size, self.gradient_accumulation_steps
        batches = []
        for number in range(self.rank, count, self.num_processes):
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
        """Return the image size of a batch, and the batch's first position in the order of images of that size.

        An epoch has as many batches as there are photos, and each size has as many batches as it has photos.
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
        picture = {
            name: torch.stack([image.picture[name][crop] for image, crop in of_crops]) for name in images[0].picture
        }
        return Batch(
            latent_mean=torch.stack([image.mean[crop] for image, crop in of_crops]),
            latent_std=torch.stack([image.std[crop] for image, crop in of_crops]),
            conditioning=self.prompts.conditioning(prompts, picture),
            sample_ids=torch.tensor(sample_ids),
            num_instance=self.train_batch_size,
            sources=tuple(image.record.path.name for image in images),
        )

    def _crop(self, image: EncodedImage, step: int, sample: int) -> int:
        count = image.num_crops
        crop = int(torch.randint(count, (), generator=generator(self.seed, "crop", step, sample)))
        if not image.has_mirrored:
            return crop
        is_mirrored = bool(torch.randint(2, (), generator=generator(self.seed, "flip", step, sample)))
        return crop + count * is_mirrored

    def _prompt(self, image: EncodedImage, step: int, sample: int) -> str:
        if self.conditioning_dropout > 0:
            draw = torch.rand((), generator=generator(self.seed, "conditioning_dropout", step, sample))
            if draw < self.conditioning_dropout:
                return ""
        is_photo = sample < self.train_batch_size * self.gradient_accumulation_steps
        variants = self.caption_variants.get(image.record.prompt, ()) if is_photo else ()
        if not variants:
            return image.record.prompt
        return variants[int(torch.randint(len(variants), (), generator=generator(self.seed, "caption", step, sample)))]
