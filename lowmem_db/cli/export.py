"""``lowmem-db export``."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model as in model.base.")],
    layout: Annotated[
        Literal["single-file", "diffusers", "lora-diffusers", "lora-kohya"] | None,
        typer.Option(
            "--format",
            help="single-file: one .safetensors in the original layout, for ComfyUI, AUTOMATIC1111 / Forge and "
            "InvokeAI. diffusers: a folder. lora-diffusers, lora-kohya: a LoRA in one file, for diffusers' "
            "load_lora_weights or for those programs. Default: single-file, or lora-kohya for a LoRA.",
        ),
    ] = None,
    precision: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Type of the weights. Default: unchanged.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File or folder to write; must not exist yet. Default: NAME.safetensors or NAME-diffusers in the "
            "working folder.",
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA into its base model first.")] = False,
    extract_lora: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Extract a LoRA of this rank from a full fine-tuning.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model that the training started from, for --extract-lora and --merge. Default: that of the run."
        ),
    ] = None,
) -> None:
    """Write a trained model in a layout that other programs load.

    [bold]lowmem-db export runs/dog --precision fp16[/bold] writes dog.safetensors. Only Stable Diffusion 1.x, 2.x and
    XL have such a layout; export other models with --format diffusers.
    """
    from lowmem_db import api

    written = api.export(
        source, out, layout=layout, precision=precision, merge=merge, extract_lora=extract_lora, base=base
    )
    typer.echo(written)
