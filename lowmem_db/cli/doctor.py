"""``lowmem-db doctor``."""

from typing import Annotated, Any

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, and which kernels and back ends are used on this machine, or why they are not."""
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lowmem_db import environment

    report: dict[str, Any] = environment.describe() | {
        "back_ends": environment.back_ends(),
        "kernels": environment.kernels(),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    out = Console(highlight=False)
    out.print(f"{report['platform']}")
    out.print("  ".join(f"{name} {version}" for name, version in report["versions"].items() if version))
    for found in report["devices"]:
        total = f"{found['total_bytes'] / environment.GIB:.1f} GiB" if found["total_bytes"] else "size unknown"
        free = f", {found['free_bytes'] / environment.GIB:.1f} GiB free" if "free_bytes" in found else ""
        out.print(f"{found['device']}: {found['name']}, {total}{free}")
    table = Table("back end", "used for", "active", "why")
    for back_end in report["back_ends"]:
        table.add_row(
            back_end["name"], back_end["serves"], "yes" if back_end["active"] else "no", escape(back_end["reason"])
        )
    out.print(table)
    operators = Table("kernel", "runs as", "why")
    for kernel in report["kernels"]:
        operators.add_row(kernel["op"], kernel["backend"], escape(kernel["reason"]))
    out.print(operators)
