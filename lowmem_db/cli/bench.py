"""``lowmem-db bench``."""

from pathlib import Path
from typing import Annotated

import typer


def bench(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Measure the small model of this package and few strategies.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer strategies and repeats, in half the time.")] = False,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Time there is; stages that need more are left out, the last ones first.")
    ] = 8.0,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.json", help="Where the report goes.")] = Path(
        "bench.json"
    ),
    share: Annotated[
        bool, typer.Option("--share", help="Print what others may see of it, and write that to a file of its own.")
    ] = False,
) -> None:
    """Measure this machine: bits, memory against the plan, speed beside a plain loop, bandwidth.

    Weights are random; nothing is downloaded or uploaded. Stages are written to the file as soon as they are done, and
    one that fails takes no other along; the exit code is then 1.
    """
    import json

    from lowmem_db import environment
    from lowmem_db.bench.bench import run_bench
    from lowmem_db.bench.report import file_name, shareable, table
    from lowmem_db.bench.setting import Setting
    from lowmem_db.console import say

    where = environment.resolve_device(device)
    if where.type == "cpu" and not tiny:
        say("bench: no card is measured, so the small model of this package stands for Stable Diffusion (--tiny)")
    report = run_bench(Setting(where, tiny=tiny or where.type == "cpu", quick=quick), output, minutes=minutes)
    typer.echo(table(report))
    say(f"bench: {output}")
    if share:
        from lowmem_db.storage.atomic import write_text

        text = json.dumps(shareable(report), indent=2) + "\n"
        path = output.with_name(file_name(report))
        typer.echo("\nThis is all that the file to be shared holds:\n\n" + text)
        write_text(path, text)
        say(f"bench: {path} can be shared; nothing was uploaded")
    if not all(stage["ok"] for stage in report["stages"]):
        raise typer.Exit(1)
