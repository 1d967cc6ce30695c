"""The drawing loop: what is in memory when, and that it does not change what is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lowmem_db.data.batches import PromptTable
from lowmem_db.engine.draw import Artist, Job, draw, kept, loaded_for_use
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.text_encoders import embed_prompts, load_text_encoders
from lowmem_db.randomness import generator
from lowmem_db.sampling.latents import SamplingSettings

CPU = torch.device("cpu")
PROMPTS = ["a dog", "a cat", "a zx dog"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFolder:
    return find_model(str(tiny_model))


@pytest.fixture(scope="module")
def table(model: ModelFolder) -> PromptTable:
    return embed_prompts(model, load_text_encoders(model), [*PROMPTS, ""])


def artist(model: ModelFolder) -> Artist:
    return Artist(model=model, settings=SamplingSettings(sampler="ddpm", num_inference_steps=2, guidance_scale=3.0))


def jobs(at_once: int | None = None) -> list[Job]:
    return [
        Job(prompts=[prompt], size=(32, 48), generators=[generator(0, "x", i) for i in range(2)], at_once=at_once)
        for prompt in PROMPTS
    ]


def load(model: ModelFolder) -> Denoiser:
    return Denoiser(model.family, {"unet": model.load("unet")})


@pytest.mark.parametrize(("jobs_at_once", "expected"), [(None, "DdCccc"), (2, "DdCccDdCc"), (1, "DdCcDdCcDdCc")])
def test_one_is_in_memory_after_the_other(
    model: ModelFolder, table: PromptTable, jobs_at_once: int | None, expected: str
) -> None:
    seen: list[str] = []

    @contextmanager
    def denoiser() -> Iterator[Denoiser]:
        seen.append("D")
        yield load(model)
        seen.append("d")

    @contextmanager
    def codec() -> Iterator[object]:
        seen.append("C")
        yield model.space.load()

    drawn = []
    for images in draw(artist(model), table, jobs(), denoiser, codec, jobs_at_once=jobs_at_once):
        seen.append("c")
        drawn.append([image.tobytes() for image in images])
    assert "".join(seen) == expected
    whole = draw(artist(model), table, jobs(), kept(load(model)), kept(model.space.load()))
    assert drawn == [[image.tobytes() for image in images] for images in whole]
    assert len({pixels for images in drawn for pixels in images}) == 6


def test_images_one_at_a_time_are_those_of_a_batch(model: ModelFolder, table: PromptTable) -> None:
    together, alone = (
        artist(model).latents(load(model), table.conditioning(["a dog", ""]), jobs(at_once)[0]) for at_once in (None, 1)
    )
    assert together.shape == (2, 4, 16, 24)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_what_is_loaded_for_use_is_loaded_each_time() -> None:
    count = iter(range(9))
    lend = loaded_for_use(lambda: next(count), CPU)
    for expected in range(2):
        with lend() as loaded:
            assert loaded == expected
