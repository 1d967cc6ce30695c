"""The drawing loop: what is in memory when, and that it does not change what is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed, resolve
from lowmem_db.data.batches import PromptTable
from lowmem_db.engine import samples
from lowmem_db.engine.draw import Artist, Job, Thrift, draw, kept, loaded_for_use
from lowmem_db.engine.generate import check_size
from lowmem_db.engine.source import find_source
from lowmem_db.errors import BudgetError, DataError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.spaces import LatentCodec
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.text_encoders import embed_prompts, load_text_encoders
from lowmem_db.randomness import generator
from lowmem_db.records import Conditioning
from lowmem_db.sampling.latents import SamplingSettings
from tests.faults import ERRORS, Fault

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


def test_batch_that_is_cut_keeps_the_prompt_of_each_image(model: ModelFolder, table: PromptTable) -> None:
    (job,) = jobs()[:1]
    one_each = replace(job, prompts=["a dog", "a cat"])
    told = table.conditioning([*one_each.prompts, ""])
    together = artist(model).latents(load(model), told, one_each)
    cut = artist(model).latents(load(model), told, replace(jobs(at_once=1)[0], prompts=one_each.prompts))
    torch.testing.assert_close(cut, together, rtol=1e-4, atol=1e-4)
    one_for_all = artist(model).latents(load(model), table.conditioning(["a dog", ""]), jobs()[0])
    assert torch.allclose(one_for_all[0], together[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one_for_all[1], together[1])


def test_what_a_phase_leaves_in_the_allocator_is_given_back_before_the_next(
    model: ModelFolder, table: PromptTable, monkeypatch: pytest.MonkeyPatch, tiny_config: Config
) -> None:
    """Between steps and samples, between samples and the decoder, and behind the decoder."""
    seen: list[str] = []
    monkeypatch.setattr(environment, "release_memory", lambda device: seen.append("release"))
    original = Artist.latents

    def latents(self: Artist, denoiser: Denoiser, conditioning: Conditioning, job: Job) -> torch.Tensor:
        seen.append("latents")
        return original(self, denoiser, conditioning, job)

    def load_decoder(config: Config, model: ModelFolder, denoiser: Denoiser) -> LatentCodec:
        seen.append("decoder")
        return model.space.load(CPU)

    monkeypatch.setattr(Artist, "latents", latents)
    monkeypatch.setattr(samples, "load_decoder", load_decoder)
    config = changed(tiny_config, {"sampling.num_inference_steps": 2, "sampling.num_images": 1})
    samples.draw_images(resolve(config), model, load(model), table, ["a dog", "a cat"])
    assert seen == ["release", "latents", "latents", "release", "decoder", "release"]


def test_what_is_loaded_for_use_is_loaded_each_time() -> None:
    count = iter(range(9))
    lend = loaded_for_use(lambda: next(count), CPU)
    for expected in range(2):
        with lend() as loaded:
            assert loaded == expected


@pytest.mark.parametrize(("number", "said"), [(0, "with 1 image at a time"), (1, "with 2 images at a time")])
def test_out_of_memory_smaller_batches_are_drawn_with_the_same_noise(
    model: ModelFolder, table: PromptTable, capsys: pytest.CaptureFixture[str], number: int, said: str
) -> None:
    count = 2 + number
    job = Job(prompts=["a dog"], size=(32, 48), generators=[])
    denoiser, codec = load(model), model.space.load()

    def pictures(thrift: Thrift) -> list[torch.Tensor]:
        two = [replace(job, generators=[generator(0, "x", i) for i in range(count)]) for _ in range(2)]
        drawn = draw(artist(model), table, two, kept(denoiser), kept(codec), thrift=thrift)
        return [torch.from_numpy(np.asarray(image).astype(int)) for images in drawn for image in images]

    expected, thrift = pictures(Thrift()), Thrift()
    with Fault(300, ERRORS[number]):  # in the second evaluation of the denoiser
        found = pictures(thrift)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(said)
    assert thrift == Thrift(at_once=-(-count // 2))
    assert thrift.is_reduced
    assert all((each - other).abs().max() <= 1 for each, other in zip(found, expected, strict=True))


def test_out_of_memory_pictures_are_decoded_in_tiles(
    model: ModelFolder, table: PromptTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, tiles, thrift = model.space.load(), [], Thrift()
    decode, calls = type(codec).decode, iter(range(9))

    def failing(self: LatentCodec, latents: torch.Tensor) -> torch.Tensor:
        if next(calls) == 1:
            raise ERRORS[0]
        return decode(self, latents)

    monkeypatch.setattr(LatentCodec, "decode", failing)
    monkeypatch.setattr(LatentCodec, "decode_in_tiles", lambda self, size: tiles.append(size))
    images = list(draw(artist(model), table, jobs(), kept(load(model)), kept(codec), thrift=thrift))
    assert [len(each) for each in images] == [2, 2, 2]
    assert thrift.tiled
    assert tiles == [48, 48]  # and the third picture is not tried in one piece again


def test_where_a_single_image_does_not_fit_the_way_out_is_named(
    model: ModelFolder, table: PromptTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise ERRORS[0]

    monkeypatch.setattr(Artist, "latents", failing)
    drawn = draw(artist(model), table, jobs(), kept(load(model)), kept(model.space.load()))
    with pytest.raises(BudgetError, match=r"drawing: out of memory .* draw on the CPU"):
        next(drawn)


@pytest.mark.parametrize(("base", "side", "nearest"), [("demo_if", 17, 16), ("demo", 101, 104)])
def test_size_that_the_network_cannot_draw_is_refused(base: str, side: int, nearest: int) -> None:
    source = find_source(base)
    with pytest.raises(DataError, match=rf"^--width: {side} is not a multiple of .*; the nearest is {nearest}$"):
        check_size(source, (16, side), ("--height", "--width"))
    check_size(source, (nearest, nearest), ("--height", "--width"))
