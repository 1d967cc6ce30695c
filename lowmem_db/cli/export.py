"""``lowmem-db export``."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model as for model.base.")],
    layout: Annotated[
        Literal["single-file", "diffusers"],
        typer.Option(
            "--format",
            help="single-file: one .safetensors in the original layout, for ComfyUI, AUTOMATIC1111 / Forge and "
            "InvokeAI. diffusers: a folder.",
        ),
    ] = "single-file",
    precision: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Type of the weights; as they are by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File or folder to write; never overwritten. NAME.safetensors or NAME-diffusers here by default.",
        ),
    ] = None,
) -> None:
    """Write a trained model in the layout that other programs load.

    [bold]lowmem-db export runs/dog --precision fp16[/bold] writes dog.safetensors; models of Stable Diffusion 1.x, 2.x
    and XL have such a layout, all others are exported with --format diffusers.
    """
    from lowmem_db.export.diffusers_folder import export_diffusers
    from lowmem_db.export.single_file import export_single_file
    from lowmem_db.export.source import find_export_source
    from lowmem_db.models.saving import DTYPES

    found = find_export_source(source)
    dtype = None if precision is None else DTYPES[precision]
    if layout == "diffusers":
        target = out or Path(f"{found.name}-diffusers")
        export_diffusers(found, target, dtype)
    else:
        target = out or Path(f"{found.name}.safetensors")
        export_single_file(found, target, dtype)
    typer.echo(target)
