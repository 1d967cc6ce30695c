"""``lowmem-db generate``."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def generate(
    source: Annotated[str, typer.Argument(help="A run folder, a model folder, a hub id, or demo.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to draw; can be repeated.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with one prompt per line.")] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="A suite of the paper's prompts; --list-suites lists them.")
    ] = None,
    list_suites: Annotated[bool, typer.Option("--list-suites", help="Print the names of the suites and exit.")] = False,
    identifier: Annotated[
        str | None, typer.Option(help="Rare token of the subject, for suites. Default: that of the run.")
    ] = None,
    class_noun: Annotated[
        str | None, typer.Option(help="Class of the subject, for suites. Default: that of the run.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed; image i of every prompt starts from the same noise.")] = 0,
    sampler: Annotated[
        Literal["ddim", "dpm_solver", "ddpm"], typer.Option(help="ddpm is the ancestral sampler.")
    ] = "ddim",
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(min=0.0, help="Classifier-free guidance.")] = 7.5,
    resolution: Annotated[
        int | None,
        typer.Option(min=8, max=8192, help="Side length in pixels. Default: that of the run, or the model's own."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model of a LoRA. Default: that of its run; a file alone does not choose.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Default: fp16 on CUDA devices, fp32 on the CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images and a grid of them.")] = Path(
        "images"
    ),
) -> None:
    """Draw images for prompts, and a grid of all of them."""
    from lowmem_db.sampling.prompts import collect_prompts, suite_names

    if list_suites:
        typer.echo("\n".join(suite_names()))
        return

    from lowmem_db import api
    from lowmem_db.engine.source import find_source
    from lowmem_db.sampling.images import GRID_FILE, make_folder, save_rows

    prompts = collect_prompts(
        prompt or [],
        prompt_file,
        suite or [],
        identifier=identifier,
        class_noun=class_noun,
        run_config=find_source(source, base).run_config,
    )
    make_folder(output)
    rows = api.generate(
        source,
        prompts,
        num_images=num_images,
        seed=seed,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        resolution=resolution,
        base=base,
        precision=precision,
        device=device,
    )
    save_rows(output, rows)
    typer.echo(output / GRID_FILE)
