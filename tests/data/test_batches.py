"""Batches are a pure function of seed and step, instance samples first."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_db.data.batches import BatchSource, EncodedImage, PromptTable
from lowmem_db.records import ImageRecord


def image(name: str, prompt: str, *, crops: int = 1) -> EncodedImage:
    record = ImageRecord(path=Path(name), content_key=name, width=8, height=8, prompt=prompt)
    values = torch.arange(crops, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return EncodedImage(
        record=record, mean=values, std=torch.zeros_like(values), picture={"facts": torch.zeros(crops, 6)}
    )


def source(**changes: object) -> BatchSource:
    ids = {prompt: {"input_ids": torch.full((3,), index)} for index, prompt in enumerate(["", "a zx dog", "a dog"])}
    fields: dict[str, object] = {
        "instance_images": [image(f"i{index}", "a zx dog", crops=3) for index in range(3)],
        "class_images": [image(f"c{index}", "a dog") for index in range(5)],
        "prompts": PromptTable(tokens=ids),
        "seed": 1,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    return BatchSource(**(fields | changes))  # type: ignore[arg-type]


def test_instance_samples_come_first_and_prior_samples_match_them_in_number() -> None:
    (batch,) = source().batches_at(0)
    assert [name[0] for name in batch.sources] == ["i", "i", "c", "c"]
    assert batch.num_instance == 2
    assert batch.sample_ids.tolist() == [0, 1, 2, 3]
    assert batch.conditioning.tokens["input_ids"][:, 0].tolist() == [1, 1, 2, 2]


def test_every_photo_is_seen_once_in_an_epoch() -> None:
    names = [name for step in range(3) for name in source().batches_at(step)[0].sources if name[0] == "i"]
    assert sorted(names) == sorted(["i0", "i1", "i2"] * 2)
    assert sorted(names[:3]) == ["i0", "i1", "i2"]


def test_without_class_images_there_are_instance_samples_alone() -> None:
    (batch,) = source(class_images=[]).batches_at(0)
    assert batch.sources == batch.sources[: batch.num_instance]
    assert len(batch.sources) == 2


def test_accumulated_batches_hold_the_samples_of_one_large_batch() -> None:
    (large,) = source(train_batch_size=4).batches_at(7)
    small = source(train_batch_size=2, gradient_accumulation_steps=2).batches_at(7)
    found = {int(sample): name for batch in small for sample, name in zip(batch.sample_ids, batch.sources, strict=True)}
    assert found == {int(sample): name for sample, name in zip(large.sample_ids, large.sources, strict=True)}


def test_crops_vary_and_repeat_with_the_step() -> None:
    crops = [int(source().batches_at(step)[0].latent_mean[0, 0, 0, 0]) for step in range(40)]
    assert set(crops) == {0, 1, 2}
    assert crops == [int(source().batches_at(step)[0].latent_mean[0, 0, 0, 0]) for step in range(40)]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_conditioning_dropout_gives_the_empty_prompt(share: float, expected: float) -> None:
    batches = source(conditioning_dropout=share)
    empty = [
        int(row) == 0
        for step in range(200)
        for row in batches.batches_at(step)[0].conditioning.tokens["input_ids"][:, 0]
    ]
    assert sum(empty) / len(empty) == pytest.approx(expected, abs=0.06)


def test_other_seed_gives_another_order() -> None:
    orders = {
        tuple(name for step in range(6) for name in source(seed=seed).batches_at(step)[0].sources) for seed in range(5)
    }
    assert len(orders) == 5


SHAPES = ((2, 2), (2, 3), (3, 2))


def in_buckets(shapes: list[tuple[int, int]], **changes: object) -> BatchSource:
    def with_shape(name: str, prompt: str, shape: tuple[int, int]) -> EncodedImage:
        one = image(name, prompt)
        values = torch.zeros(1, 1, *shape)
        return EncodedImage(record=one.record, mean=values, std=values, picture=one.picture)

    return source(
        instance_images=[with_shape(f"i{number}", "a zx dog", shape) for number, shape in enumerate(shapes)],
        class_images=[with_shape(f"c{number}", "a dog", shape) for number, shape in enumerate(sorted(set(shapes)) * 3)],
        **changes,
    )


@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6),
    size=st.integers(1, 4),
    accumulated=st.integers(1, 3),
)
def test_batches_of_buckets_never_mix_sizes_and_see_every_photo_equally(
    shapes: list[tuple[int, int]], size: int, accumulated: int
) -> None:
    batches = in_buckets(shapes, train_batch_size=size, gradient_accumulation_steps=accumulated)
    drawn = [batch for step in range(2 * len(shapes)) for batch in batches.batches_at(step)]
    assert len(drawn) == 2 * len(shapes) * accumulated
    seen: dict[str, int] = {}
    for batch in drawn:
        shape = tuple(batch.latent_mean.shape[-2:])
        names, class_names = batch.sources[:size], batch.sources[size:]
        assert {shapes[int(name[1:])] for name in names} == {shape}
        assert {name[0] for name in class_names} == {"c"}
        assert len(class_names) == size
        for name in names:
            seen[name] = seen.get(name, 0) + 1
    assert seen == {f"i{number}": 2 * accumulated * size for number in range(len(shapes))}


def test_batches_of_buckets_depend_on_the_step_alone() -> None:
    shapes = [SHAPES[0], SHAPES[1], SHAPES[0], SHAPES[2]]
    forward = [in_buckets(shapes).batches_at(step)[0].sources for step in range(9)]
    backward = [in_buckets(shapes).batches_at(step)[0].sources for step in reversed(range(9))]
    assert forward == backward[::-1]
    assert len(set(forward)) > 4


def test_photos_of_one_size_come_in_the_order_of_squares() -> None:
    squares = source(train_batch_size=3)
    wide = in_buckets([SHAPES[1]] * 3, train_batch_size=3)
    for step in range(4):
        assert wide.batches_at(step)[0].sources[:3] == squares.batches_at(step)[0].sources[:3]
