"""``lowmem-db ui``."""

from pathlib import Path
from typing import Annotated

import typer


def ui(
    folder: Annotated[
        Path, typer.Argument(metavar="[RUNS_OR_RUN]", help="A folder of runs, or a run to watch.")
    ] = Path("runs"),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: 8642, or another one if that is in use.")
    ] = None,
    proxy: Annotated[
        bool,
        typer.Option("--proxy", help="For Colab: accept the name of its proxy, and let the page stand in a frame."),
    ] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address, and open no browser.")] = False,
) -> None:
    """Open a local page to start, steer and watch runs: from photos to pictures.

    It is served to this machine alone, and only to whoever has the token in its address. Closing it stops no run, and
    [bold]lowmem-db ui runs/dog[/bold] watches one that was started from the command line.
    """
    from lowmem_db import environment
    from lowmem_db.errors import CheckpointError

    for name in ("starlette", "uvicorn", "python_multipart"):
        environment.require(name)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"RUNS_OR_RUN: {folder} is a file; allowed: a folder of runs, or a run")

    from lowmem_db.ui.server import serve

    serve(folder, port=port, behind_proxy=proxy, open_browser=not no_browser)
