"""``lowmem-db report``."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file. Default: report.html, in the run folder if it is one."),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Leave out photos, paths and names of folders, and say what is in it.")
    ] = False,
) -> None:
    """Write one self-contained page about a run: samples, losses, memory, scores, checkpoints, settings."""
    from lowmem_db import api

    path = api.report(runs, output, share=share)
    if share:
        typer.echo(
            "It holds: prompts, samples, losses, learning rates, scores, memory, settings without paths, versions, "
            "and the name of the device. It holds no photo, no path and no name of a folder, a user or a computer.",
            err=True,
        )
    typer.echo(path)
