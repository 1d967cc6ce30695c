"""``lowmem-db gallery``."""

from pathlib import Path
from typing import Annotated

import typer


def gallery(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES...", help="A folder of images for each method, as generate and evaluate write."),
    ],
    real: Annotated[
        Path | None, typer.Option(help="Photos of the subject, or a folder of them for each subject.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Name of a method, once for each folder. Default: the folder names.")
    ] = None,
    subjects: Annotated[str | None, typer.Option(help="How many subjects, or their names separated by commas.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="How many prompts, from the first.")] = None,
    num_images: Annotated[int | None, typer.Option("--images", min=1, help="Images of each prompt.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("gallery.html"),
) -> None:
    """Show real photos beside the images of several methods, prompt by prompt, on one self-contained page.

    [bold]lowmem-db gallery dreambooth textual_inversion --real photos/dog[/bold]
    """
    from lowmem_db import api

    typer.echo(
        api.gallery(
            images,
            real,
            names=name or (),
            subjects=subjects,
            num_prompts=prompts,
            num_images=num_images,
            output=output,
        )
    )
