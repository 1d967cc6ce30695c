"""``lowmem-db photos``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowmem_db.console import results
from lowmem_db.errors import DataError

if TYPE_CHECKING:
    from lowmem_db.data.inspection import Inspection


def photos(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER_OR_CONFIG [section.key=value]...",
            help="A folder of photos, or the configuration of a run with its photos and class images.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The contact sheet.")] = Path("photos.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what training will see of a folder of photos, before anything expensive.

    [bold]lowmem-db photos photos/dog data.resolution=768[/bold] draws a contact sheet with the crops, and lists
    sizes, captions, sharpness, near-duplicates, and what is not read and why.
    """
    from lowmem_db import api

    found = api.inspect_photos(arguments[0], arguments[1:], output=output)
    if as_json:
        import json

        typer.echo(json.dumps({name: inspection.as_json() for name, inspection in found.items()}, indent=2))
    else:
        for inspection in found.values():
            _print(inspection)
        typer.echo(output)
    if problems := [f"{each.field}: {problem}" for each in found.values() for problem in each.problems]:
        raise DataError("\n".join(problems))


def _print(found: "Inspection") -> None:
    from rich.table import Table

    out = results()
    table = Table("photo", "size", "trained at", "crops", "sharpness", "prompt", title=str(found.folder))
    for photo in found.photos:
        table.add_row(
            photo.record.path.name,
            f"{photo.record.width} x {photo.record.height}",
            f"{photo.size[1]} x {photo.size[0]}",
            str(len(photo.crops)),
            f"{photo.sharpness:.0f}",
            photo.record.prompt if photo.has_caption else "",
        )
    out.print(table)
    for line in (found.captions, *found.warnings, *found.remarks):
        out.print(line, soft_wrap=True)
