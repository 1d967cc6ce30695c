"""``lowmem-db doctor``."""

from typing import Annotated, Any

import typer

from lowmem_db.console import results


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, kernels and back ends, and a verdict: what fits this machine, what to install."""
    import json
    from dataclasses import asdict

    from rich.table import Table

    from lowmem_db import environment
    from lowmem_db.planning.verdict import verdict

    found = verdict()
    report: dict[str, Any] = environment.describe() | {
        "back_ends": environment.back_ends(),
        "kernels": environment.kernels(),
        "verdict": asdict(found),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    out = results()
    out.print(f"{report['platform']}")
    out.print("  ".join(f"{name} {version}" for name, version in report["versions"].items() if version))
    for each in report["devices"]:
        total = f"{each['total_bytes'] / environment.GIB:.1f} GiB" if each["total_bytes"] else "size unknown"
        free = f", {each['free_bytes'] / environment.GIB:.1f} GiB free" if "free_bytes" in each else ""
        out.print(f"{each['device']}: {each['name']}, {total}{free}")
    table = Table("back end", "used for", "active", "why")
    for back_end in report["back_ends"]:
        table.add_row(back_end["name"], back_end["serves"], "yes" if back_end["active"] else "no", back_end["reason"])
    out.print(table)
    operators = Table("kernel", "runs as", "why")
    for kernel in report["kernels"]:
        operators.add_row(kernel["op"], kernel["backend"], kernel["reason"])
    out.print(operators)
    for line in found.lines():
        typer.echo(line)
