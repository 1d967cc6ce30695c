"""``lowmem-db configs``."""

from pathlib import Path
from typing import Annotated

import typer

from lowmem_db.config import shipped


def configs(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME", help="Configurations to copy.", show_default=False, autocompletion=shipped.names
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to copy them into.")] = Path(),
) -> None:
    """List the configurations in this package, or copy some to change them.

    Each can be used by its name: [bold]lowmem-db train demo[/bold].
    """
    if not names:
        width = max(map(len, shipped.names()))
        for name in shipped.names():
            typer.echo(f"{name:<{width}}  {shipped.describe(name)}")
        return
    for name in names:
        for written in shipped.copy(name, output):
            typer.echo(written)
