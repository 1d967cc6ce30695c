"""``lowmem-db plan``."""

from typing import TYPE_CHECKING, Annotated

import typer

from lowmem_db.config import shipped
from lowmem_db.console import results

if TYPE_CHECKING:
    from lowmem_db.config.schema import Config


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [section.key=value]... [--flag value]...",
            help="As for train.",
            show_default=False,
            autocompletion=shipped.names,
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory that the run may use: 8, 8G, 7.5GiB. Default: memory.budget.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help='A card, such as "rtx 3060"; its memory is the budget if none is given.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(min=1, help="Plan for so many processes, each on such a card, that share every step."),
    ] = None,
    all_gpus: Annotated[
        bool, typer.Option("--all-gpus", help="Plan for every card that the planner knows, in one table.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run three real steps on this machine and print what they needed.")
    ] = False,
) -> None:
    """Predict how much memory a run needs, and choose the fastest strategy that fits the budget.

    Needs neither weights nor a GPU: [bold]lowmem-db plan sd15_full_12gb --gpu "rtx 3060"[/bold]
    """
    import json
    import sys

    from lowmem_db import api
    from lowmem_db.cli.arguments import read_arguments

    processes = [] if num_processes is None else [f"distributed.num_processes={num_processes}"]
    config = read_arguments([*(arguments or []), *processes], needs_photos=False).config
    if all_gpus:
        _plan_for_all_cards(config, as_json=as_json, given=[gpu, budget, verify or None])
        return
    found = api.plan(config, gpu=gpu, budget=budget, here=verify)

    from lowmem_db.planning.measured import verify as verify_plan
    from lowmem_db.planning.output import as_json as to_json
    from lowmem_db.planning.output import show

    verified = verify_plan(found) if verify else None
    if as_json:
        typer.echo(json.dumps(to_json(found) | ({} if verified is None else verified.as_json()), indent=2))
        return
    out = results(soft_wrap=not sys.stdout.isatty())
    show(found, out)
    if verified is not None:
        out.print(verified.describe())


def _plan_for_all_cards(config: "Config", *, as_json: bool, given: list[object]) -> None:
    """Print a table with a row for each card."""
    import json

    from lowmem_db.errors import ConfigError
    from lowmem_db.planning.output import as_json as to_json
    from lowmem_db.planning.survey import surveyed, table_of

    if any(option is not None for option in given):
        raise ConfigError("--all-gpus: plans for every card; leave --gpu, --budget and --verify out")
    plans = surveyed(config)
    if as_json:
        rows = {card.name: None if plan is None else to_json(plan) for card, plan in plans}
        typer.echo(json.dumps(rows, indent=2))
    else:
        results().print(table_of(plans))
