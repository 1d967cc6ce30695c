"""``lowmem-db generate``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from lowmem_db.errors import ConfigError
from lowmem_db.launch import is_first


def _list_suites(is_asked: bool) -> bool:
    if is_asked:
        from lowmem_db.sampling.prompts import suite_names

        typer.echo("\n".join(suite_names()))
        raise typer.Exit
    return is_asked


def generate(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a LoRA, or a model as in model.base.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to draw; can be repeated. Default: the prompt of the run."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the images should not show.")] = None,
    step: Annotated[
        str | None,
        typer.Option(metavar="N", help="Draw with this checkpoint of a run. Default: the final model, or the newest."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="A,B,final", help="Compare checkpoints: every prompt is drawn with each of them."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the model is that a run or a LoRA was trained on, if it has moved.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with one prompt per line.")] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="A suite of the paper's prompts; --list-suites lists them.")
    ] = None,
    comic: Annotated[
        Path | None,
        typer.Option(
            metavar="SCRIPT", help="A comic: a YAML file with panels, each with a prompt and the words drawn into it."
        ),
    ] = None,
    list_suites: Annotated[
        bool,
        typer.Option(
            "--list-suites", help="Print the names of the suites and exit.", is_eager=True, callback=_list_suites
        ),
    ] = False,
    identifier: Annotated[
        str | None, typer.Option(help="Rare token of the subject, for suites and comics. Default: that of the run.")
    ] = None,
    class_noun: Annotated[
        str | None, typer.Option(help="Class of the subject, for suites and comics. Default: that of the run.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Images per prompt. Default: 4; for a comic those that are shown.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; image i of every prompt starts from the same noise.")] = 0,
    sampler: Annotated[
        Literal["ddim", "dpm_solver", "ddpm"] | None,
        typer.Option(help="ddpm is the ancestral sampler. Default: that of the run's samples, or ddim."),
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps. Default: those of the run's samples, or 50.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Classifier-free guidance. Default: that of the run's samples, or 7.5; 2 for models of this package.",
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=8, help="Width and height in pixels. Default: that of the run, or the model's own."),
    ] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Height in pixels.")] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Default: fp16 on CUDA devices, fp32 on the CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    upscale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN_OR_MODEL",
            help="A super-resolution model that enlarges the images; several are used one after the other.",
        ),
    ] = None,
    stream_weights: Annotated[
        bool | None,
        typer.Option(
            "--stream-weights/--no-stream-weights",
            help="Keep weights on the host and bring them to the card part by part; the images are the same. "
            "Default: as in the run, and where they do not fit the card otherwise.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images and a grid of them.")] = Path(
        "images"
    ),
) -> None:
    """Draw images for prompts, and a grid of all of them.

    Without options [bold]lowmem-db generate runs/dog[/bold] draws the prompt of the run as its samples are drawn.
    images.json beside the images holds the settings and the seed of each image.
    """
    from lowmem_db.cli.steps import parse_step, parse_steps
    from lowmem_db.run.inputs import check_source, config_of
    from lowmem_db.sampling.prompts import collect_prompts

    del list_suites  # answered by its callback
    if comic and (given := _given({"--prompt": prompt, "--prompt-file": prompt_file, "--suite": suite})):
        raise ConfigError(f"{given}: no effect with --comic, whose script has the prompts; leave it out")
    if not (comic or suite) and (given := _given({"--identifier": identifier, "--class-noun": class_noun})):
        raise ConfigError(
            f"{given}: is for the prompts of --suite and --comic, and there are none; leave it out, or write it into "
            "the prompt"
        )
    check_source(source, base, upscale or ())

    from lowmem_db import api

    prompts = collect_prompts(
        prompt or [],
        prompt_file,
        suite or [],
        identifier=identifier,
        class_noun=class_noun,
        run_config=config_of(source),
    )
    api.generate(
        source,
        prompts,
        num_images=num_images,
        comic=comic,
        identifier=None if comic is None else identifier,
        class_noun=None if comic is None else class_noun,
        seed=seed,
        negative_prompt=negative_prompt,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        resolution=resolution,
        width=width,
        height=height,
        precision=precision,
        device=device,
        step=None if step is None else parse_step(step),
        steps=parse_steps(steps),
        base=base,
        upscale=upscale or (),
        stream_weights=stream_weights,
        output=output,
    )
    if is_first():
        typer.echo(output / ("grid.png" if comic is None else "comic.png"))


def _given(options: Mapping[str, object]) -> str:
    return ", ".join(name for name, value in options.items() if value)
