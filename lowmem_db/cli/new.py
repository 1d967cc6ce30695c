"""``lowmem-db new``."""

from pathlib import Path
from typing import Annotated

import typer

from lowmem_db.config.recipes import IDENTIFIER, RECIPES


def new(
    photos: Annotated[
        Path | None, typer.Argument(metavar="PHOTOS", help="Folder of the photos.", show_default=False)
    ] = None,
    what: Annotated[str | None, typer.Option(help="What they show: dog, teapot, face.", show_default=False)] = None,
    identifier: Annotated[
        str, typer.Option(help="The rare word that names it in prompts; [bold]identifiers[/bold] lists some.")
    ] = IDENTIFIER,
    config: Annotated[
        str | None,
        typer.Option(
            help=f"The configuration to start from: {', '.join(RECIPES)}. Default: the one for --base, or for this "
            "machine.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A model in place of the one in --config: a file, a folder, a hub id.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help='Plan for this card, such as "rtx 3060".')] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file. Default: named after what the photos show.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take the defaults for what is not given.")
    ] = False,
) -> None:
    """Write a configuration for your photos: asks for what is not given, plans for this card, prints the command.

    [bold]lowmem-db new photos/teapot --what teapot --yes[/bold] writes teapot.yaml, 25 lines at most.
    """
    from lowmem_db.cli.asking import answer
    from lowmem_db.data.folder import look_into
    from lowmem_db.run.new import recipe_here

    folder = photos or Path(answer("Folder of the photos", default="photos", ask=not yes))
    look_into(folder, "PHOTOS")
    noun = what or answer("What do they show? (dog, red teapot, face)", default=None, ask=not yes, option="--what")
    if config is None and base is None and not yes:
        typer.echo(f"Start from: {', '.join(RECIPES)}; or name a model of yours", err=True)
        given = answer("Base", default=recipe_here(), ask=True)
        config, base = (given, None) if given in RECIPES else (None, given)

    from lowmem_db import api
    from lowmem_db.console import quoted, say

    file = api.new(folder, noun, identifier=identifier, config=config, base=base, gpu=gpu, output=output)
    header = [line for line in file.read_text(encoding="utf-8").splitlines()[2:] if line.startswith("# ")]
    for line in header[:3]:
        say(line.removeprefix("# "))
    say(f"{file} is yours to change. Train it with: lowmem-db train {quoted(file)}")
    typer.echo(file)
