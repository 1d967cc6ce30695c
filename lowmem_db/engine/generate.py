"""Drawing prompts with a model on disk: a run, a folder, or a hub id. One component is in memory at a time."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lowmem_db.config.schema import Sampler, SamplingConfig
from lowmem_db.console import say, warn
from lowmem_db.distributed.world import ALONE, World
from lowmem_db.engine.draw import Artist, Job, draw, loaded_for_use
from lowmem_db.engine.enlarging import find_stages
from lowmem_db.engine.fitting import too_many_steps
from lowmem_db.engine.source import ImageSource, Step, find_source, streamed_if_needed
from lowmem_db.errors import DataError
from lowmem_db.models.text_encoders import cut_prompt_warnings
from lowmem_db.randomness import derive_seed, generator
from lowmem_db.records import Size
from lowmem_db.sampling.images import make_folder, save_rows
from lowmem_db.sampling.latents import SamplingSettings
from lowmem_db.storage.places import EMBEDDED_GUIDANCE
from lowmem_db.storage.run_folder import write_json

STREAM = "samples"
SETTINGS_FILE = "images.json"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is drawn, and how; what is left out is taken from the run, or is the default.

    Attributes:
        prompts: What to draw. Default: the instance prompt of the run.
        negative_prompt: What guidance leads away from. Default: that of the run's samples, or nothing.
        num_images: Images of each prompt.
        seed: Seed of the noise.
        sampler: Default: that of the run's samples, or ``ddim``.
        num_inference_steps: Default: those of the run's samples, or 50.
        guidance_scale: Default: that of the run's samples, or 7.5; 2 for a model in this package.
        width: In pixels. Default: the resolution of the run, or the model's own.
        height: In pixels. Default: as for the width.
        upscale: Super-resolution models, as in :func:`find_source`, that enlarge the images one after the other.
        stream_weights: Whether weights stay on the host and pass through the device part by part, which changes no
            image. Default: as in the run, and where they do not fit a card otherwise.
    """

    prompts: Sequence[str] = ()
    negative_prompt: str | None = None
    num_images: int = 4
    seed: int = 0
    sampler: Sampler | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    upscale: Sequence[str] = ()
    stream_weights: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is drawn, and how, with nothing left out; attributes as in :class:`Wishes`."""

    prompts: Sequence[str]
    negative_prompt: str = ""
    num_images: int
    seed: int
    settings: SamplingSettings
    size: Size

    def as_json(self) -> dict[str, Any]:
        """Return everything under its name in ``images.json``."""
        own = {"prompts": self.prompts, "negative_prompt": self.negative_prompt}
        own |= {"num_images": self.num_images, "seed": self.seed}
        return own | asdict(self.settings) | {"width": self.size[1], "height": self.size[0]}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The images of one prompt, from one model.

    Attributes:
        number: The number of the prompt, from zero.
        prompt: The prompt.
        step: The checkpoint that drew them, ``final``, or None if nothing was chosen.
        images: The images.
    """

    number: int
    prompt: str
    step: Step | None
    images: Sequence[Image.Image]

    @property
    def label(self) -> str:
        """What stands above the images in a grid."""
        return self.prompt if self.step is None else f"{_in_words(self.step)}: {self.prompt}"


def generate_at(
    source: str,
    steps: Sequence[Step | None],
    base: str | None,
    wishes: Wishes,
    device: torch.device,
    dtype: torch.dtype,
    world: World = ALONE,
) -> tuple[list[Row], dict[str, Any]]:
    """Draw each prompt with each of several checkpoints.

    Args:
        source: As in :func:`find_source`.
        steps: Checkpoints; ``[None]`` for the model that :func:`find_source` chooses.
        base: As in :func:`find_source`.
        wishes: What is drawn.
        device: Device to compute on.
        dtype: Type to compute in.
        world: The processes that draw prompts in turn; the first one enlarges, so that its images alone are complete.

    Returns:
        The rows, those of a prompt together, and the settings that they were drawn with.

    Raises:
        ConfigError: The model predicts epsilon and its last timestep is pure noise.
        DataError: A checkpoint does not exist, there is nothing to draw, or a size does not fit the model.
        ModelError: The model does not exist.
    """
    sources = [
        replace(find_source(source, step=step, base=base), stream_weights=wishes.stream_weights) for step in steps
    ]
    stages = find_stages(wishes.upscale, stream_weights=wishes.stream_weights)
    work = _with_defaults(sources[0], wishes)
    for found in sources:
        _check(found, work)
    if stages and work.size[0] != work.size[1]:
        raise DataError(
            f"--upscale: enlarges squares, but --width {work.size[1]} and --height {work.size[0]} draw none; leave "
            "both out, or draw without --upscale"
        )
    for message in cut_prompt_warnings(sources[0].model, [*work.prompts, work.negative_prompt]):
        warn(message)
    by_step = []
    for step, found in zip(steps, sources, strict=True):
        if len(steps) > 1:
            say(f"drawing with {_in_words(step)}")
        drawn = _draw(found, work, device, dtype, world)
        for number, stage in enumerate(stages if world.is_first else (), 1):
            prompts = stage.prompts(work.prompts, sources[0].run_config)
            drawn = stage.enlarge(drawn, prompts, seed=work.seed, number=number, device=device, dtype=dtype)
        by_step.append(
            [
                Row(number=number, prompt=prompt, step=step, images=images)
                for number, (prompt, images) in enumerate(zip(work.prompts, drawn, strict=True))
            ]
        )
    rows = [row for of_prompt in zip(*by_step, strict=True) for row in of_prompt]
    told = {"upscale": [stage.as_json() for stage in stages]} if stages else {}
    return rows, work.as_json() | {"precision": str(dtype).removeprefix("torch.")} | told


def generate_images(
    source: ImageSource,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    num_images: int,
    resolution: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[tuple[str, list[Image.Image]]]:
    """Draw square images with a model that has been found; return each prompt with its images.

    Args:
        source: The model to draw from.
        prompts: The prompts to draw.
        settings: Sampler, steps and guidance.
        num_images: Number of images of each prompt.
        resolution: Height and width in pixels.
        seed: Seed of the noise.
        device: Device to compute on.
        dtype: Type to compute in.

    Raises:
        DataError: The resolution is not a multiple of the size of a latent pixel, or there are more sampling steps than
            the model's noise schedule has.
        ConfigError: The model predicts epsilon and its last timestep is pure noise.
    """
    size = (resolution, resolution)
    work = Work(prompts=prompts, num_images=num_images, seed=seed, settings=settings, size=size)
    _check(source, work)
    return list(zip(prompts, _draw(source, work, device, dtype), strict=True))


def save(folder: Path, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    """Save the images, a grid of them, and ``images.json`` with the settings and the seed of each image.

    ``torch_seed`` is the seed of a generator on the CPU with which diffusers draws the same noise.

    Raises:
        StorageError: The disk is full.
    """
    make_folder(folder)
    names = [("" if row.step is None else f"{_in_a_name(row.step)}-") + f"{row.number:02d}" for row in rows]
    save_rows(folder, [(row.label, row.images) for row in rows], names)
    images = [
        {
            "file": f"{name}-{index:02d}.png",
            "prompt": row.prompt,
            "step": row.step,
            "torch_seed": derive_seed(settings["seed"], STREAM, index),
        }
        for row, name in zip(rows, names, strict=True)
        for index in range(len(row.images))
    ]
    write_json(folder / SETTINGS_FILE, {**settings, "images": images})


def check_size(source: ImageSource, size: Size, fields: Sequence[str]) -> None:
    """Refuse a size that the model cannot draw.

    Args:
        source: The model.
        size: Height and width in pixels.
        fields: What they are called, for messages.

    Raises:
        DataError: A side is not a multiple of what the model's family draws in one piece.
    """
    model = source.model
    step = model.family.drawing_step(model)
    what = "size of a latent pixel" if step == model.space.cell else "pixels in one position at the UNet's lowest level"
    for field, side in zip(fields, size, strict=True):
        if side % step:
            near = step * max(1, round(side / step))
            raise DataError(f"{field}: {side} is not a multiple of {step}, the {what}; the nearest is {near}")


def _with_defaults(source: ImageSource, wishes: Wishes) -> Work:
    """Fill in what is left out."""
    config = source.run_config
    own = None if config is None else config.sampling
    if not wishes.prompts and config is None:
        raise DataError('there is nothing to draw; add --prompt "a sks dog", --prompt-file FILE or --suite NAME')
    if not wishes.prompts and config is not None:
        say(f"drawing {config.subject.instance_prompt!r}, the prompt of the run")
    return Work(
        prompts=tuple(wishes.prompts) or ((config.subject.instance_prompt,) if config is not None else ()),
        negative_prompt=wishes.negative_prompt or ("" if own is None else own.negative_prompt),
        num_images=wishes.num_images,
        seed=wishes.seed,
        settings=SamplingSettings(
            sampler=wishes.sampler or ("ddim" if own is None else own.sampler),
            num_inference_steps=wishes.num_inference_steps or (50 if own is None else own.num_inference_steps),
            guidance_scale=_usual_guidance(source) if wishes.guidance_scale is None else wishes.guidance_scale,
        ),
        size=(wishes.height or source.resolution, wishes.width or source.resolution),
    )


def _usual_guidance(source: ImageSource) -> float:
    if source.run_config is not None:
        return source.run_config.sampling.guidance_scale
    return EMBEDDED_GUIDANCE if source.is_embedded else SamplingConfig().guidance_scale


def _check(source: ImageSource, work: Work) -> None:
    """Refuse what the model cannot draw."""
    height, width = work.size
    fields = ("--resolution", "--resolution") if width == height else ("--height", "--width")
    check_size(source, work.size, fields)
    if source.model.family.enlarges:
        raise DataError(
            f"{source.model.name}: enlarges pictures and draws none from a prompt alone; name the model that draws "
            f"them, and this one as --upscale {source.model.name}"
        )
    steps, sampler = work.settings.num_inference_steps, work.settings.sampler
    if problem := too_many_steps("--num-inference-steps", source.model, sampler, steps, source.objective):
        raise DataError(problem)


def _draw(
    source: ImageSource, work: Work, device: torch.device, dtype: torch.dtype, world: World = ALONE
) -> list[list[Image.Image]]:
    """Draw the images of each prompt; image ``i`` of every prompt starts from the same noise, for comparison."""
    own = streamed_if_needed(source, partial(_drawn, work, device, dtype, world.share), device)
    return world.gathered_in_turn(own)


def _drawn(
    work: Work,
    device: torch.device,
    dtype: torch.dtype,
    share: Callable[[Sequence[Job]], Sequence[Job]],
    source: ImageSource,
) -> list[list[Image.Image]]:
    """Draw one process's share of the prompts; all are embedded, as bits may depend on what is embedded together."""
    table = source.embed([*work.prompts, work.negative_prompt], device, dtype)
    artist = Artist(model=source.model, settings=work.settings, objective=source.objective)
    jobs = share(
        [
            Job(
                prompts=[prompt],
                size=work.size,
                generators=[generator(work.seed, STREAM, index) for index in range(work.num_images)],
                negative=work.negative_prompt,
            )
            for prompt in work.prompts
        ]
    )
    if not jobs:
        return []
    denoiser = loaded_for_use(partial(source.load_denoiser, device, dtype), device)
    codec = loaded_for_use(partial(source.model.space.load, device), device)
    return list(draw(artist, table, jobs, denoiser, codec, progress="drawing prompts"))


def _in_words(step: Step | None) -> str:
    return f"step {step}" if isinstance(step, int) else "the final model"


def _in_a_name(step: Step) -> str:
    return f"step-{step:06d}" if isinstance(step, int) else step
