"""Samples during training, from the model in memory; the decoder is loaded for them and freed again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from PIL.Image import Image
from torch import nn

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.data.batches import PromptTable
from lowmem_db.distributed.world import ALONE, World
from lowmem_db.engine.draw import Artist, Job, Thrift, draw, loaded_for_use
from lowmem_db.memory import weight_stream
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.spaces import Codec
from lowmem_db.models.folder import ModelFolder
from lowmem_db.randomness import generator
from lowmem_db.sampling.images import GRID_FILE, save_rows
from lowmem_db.sampling.latents import SamplingSettings
from lowmem_db.storage.atomic import write_folder
from lowmem_db.storage.run_folder import RunFolder


def draw_samples(
    config: Config,
    model: ModelFolder,
    denoiser: Denoiser,
    prompts: PromptTable,
    run: RunFolder,
    thrift: Thrift,
    step: int,
    world: World = ALONE,
) -> None:
    """Draw ``sampling.num_images`` images of each of ``sampling.prompts`` into ``samples/step-N/``, with a grid."""
    rows = draw_images(config, model, denoiser, prompts, config.sampling.prompts, thrift, world)
    folder = run.samples_dir(step)
    write_folder(folder, lambda temporary: save_rows(temporary, rows))
    say(f"samples of step {step}: {folder / GRID_FILE}")


def draw_images(
    config: Config,
    model: ModelFolder,
    denoiser: Denoiser,
    table: PromptTable,
    prompts: Sequence[str],
    thrift: Thrift | None = None,
    world: World = ALONE,
) -> list[tuple[str, list[Image]]]:
    """Draw ``sampling.num_images`` images of each prompt; return each prompt with its images.

    Several processes draw prompts in turn: the first one tells the others which, and they call this with them.
    """
    if world.is_first:
        world.from_first(lambda: prompts)
    codec = loaded_for_use(partial(load_decoder, config, model, denoiser), denoiser.device)
    jobs = [sample_job(config, prompt) for prompt in prompts]
    own = world.share(jobs)
    if config.distributed.sharding == "full":
        own = [*own, *jobs[: -(-len(jobs) // world.size) - len(own)]]  # no weights without the others: all draw as many
    artist = sample_artist(config, model)
    drawn = list(draw(artist, table, own, partial(evaluating, denoiser), codec, thrift=thrift)) if own else []
    return list(zip(prompts, world.gathered_in_turn(drawn)[: len(prompts)], strict=True))


def sample_artist(config: Config, model: ModelFolder) -> Artist:
    """Return the model and settings for the samples of a run."""
    settings = SamplingSettings(
        sampler=config.sampling.sampler,
        num_inference_steps=config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
    )
    return Artist(model=model, settings=settings, objective=config.objective)


def sample_job(config: Config, prompt: str) -> Job:
    """Return the job for the samples of one prompt."""
    return Job(
        prompts=[prompt],
        size=(config.data.resolution, config.data.resolution),
        generators=[generator(config.sampling.seed, "samples", index) for index in range(config.sampling.num_images)],
        at_once=1 if config.memory.tiled_samples else None,
        negative=config.sampling.negative_prompt,
    )


def load_decoder(config: Config, model: ModelFolder, denoiser: Denoiser) -> Codec:
    """Load the decoder: in fp32 or, for tiled samples, in the type of the weights.

    An autoencoder that must compute in fp32 does so for tiled samples too.
    """
    tiled = bool(config.memory.tiled_samples)
    codec = model.space.load(denoiser.device, denoiser.dtype) if tiled else model.space.load(denoiser.device)
    if config.memory.stream_weights:
        codec.drop_encoder()
    if tiled:
        codec.decode_in_tiles(config.data.resolution)
    return codec


@contextmanager
def evaluating(denoiser: Denoiser) -> Iterator[Denoiser]:
    """Return a context in which the trained components are in evaluation mode.

    What the allocator of a card keeps is given back on both sides: what comes next needs blocks of other sizes.
    """
    modules: list[nn.Module] = list(denoiser.modules().values())
    environment.release_memory(denoiser.device)
    for module in modules:
        module.eval()
    try:
        yield denoiser
    finally:
        weight_stream.rest(modules)
        for module in modules:
            module.train()
        environment.release_memory(denoiser.device)
