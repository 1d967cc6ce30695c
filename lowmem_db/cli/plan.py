"""``lowmem-db plan``."""

from typing import Annotated

import typer


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [section.key=value]... [--flag value]...", help="As for train.", show_default=False
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory that the run may use: 8GiB, 7.5GB. Default: memory.budget.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help='A card, such as "rtx 3060"; its memory is the budget if none is given.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run three real steps on this machine and print what they needed.")
    ] = False,
) -> None:
    """Predict how much memory a run needs, and choose the fastest strategy that fits the budget.

    Needs neither weights nor a GPU: [bold]lowmem-db plan configs/sd15_full_12gb.yaml --gpu "rtx 3060"[/bold]
    """
    import json

    from lowmem_db import api
    from lowmem_db.cli.arguments import read_arguments

    config = read_arguments(arguments or [], needs_photos=False).config
    found = api.plan(config, gpu=gpu, budget=budget, here=verify)

    from rich.console import Console

    from lowmem_db.planning.measured import verify as verify_plan
    from lowmem_db.planning.output import as_json as to_json
    from lowmem_db.planning.output import show

    verified = verify_plan(found) if verify else None
    if as_json:
        typer.echo(json.dumps(to_json(found) | ({} if verified is None else verified.as_json()), indent=2))
        return
    out = Console(highlight=False, soft_wrap=True)
    show(found, out)
    if verified is not None:
        out.print(verified.describe(), markup=False)
