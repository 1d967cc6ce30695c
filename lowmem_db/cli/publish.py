"""``lowmem-db publish``."""

from pathlib import Path
from typing import Annotated

import typer


def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    model_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Show a repository that is created to nobody else.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
) -> None:
    """Upload a finished model with its card and samples; lists what is sent, and asks.

    Needs a login: [bold]hf auth login[/bold]. No photo of yours, no path, no name of a folder, a user or a machine is
    sent.
    """
    from lowmem_db.cli.asking import confirmed
    from lowmem_db.storage import hub

    hub.check_id(model_id)

    from lowmem_db import api
    from lowmem_db.console import say

    files = api.files_to_publish(run)
    for name, size in files.items():
        say(f"{size / 1e6:10.1f} MB  {name}")
    say(f"{sum(files.values()) / 1e6:10.1f} MB in all, to https://huggingface.co/{model_id}")
    if confirmed("Send it?", yes=yes):
        typer.echo(api.publish(run, model_id, private=private))
