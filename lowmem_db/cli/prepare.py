"""``lowmem-db prepare``."""

from typing import Annotated

import typer

from lowmem_db.config import shipped


def prepare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [section.key=value]... [--flag value]...",
            help="As for train.",
            show_default=False,
            autocompletion=shipped.names,
        ),
    ] = None,
) -> None:
    """Fill the caches of a run: class images, latents and text embeddings. Existing ones are kept."""
    from lowmem_db.cli.arguments import read_arguments
    from lowmem_db.data.inputs import check_inputs

    config = read_arguments(arguments or []).config
    check_inputs(config)

    from lowmem_db.console import say
    from lowmem_db.run.run import prepare_data

    batches = prepare_data(config)
    say(
        f"ready: {len(batches.instance_images)} photos, {len(batches.class_images)} class images, in {config.cache_dir}"
    )
