"""``lowmem-db prepare``."""

from typing import Annotated

import typer


def prepare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [section.key=value]... [--flag value]...", help="As for train.", show_default=False
        ),
    ] = None,
) -> None:
    """Fill the caches of a run: class images, latents, text embeddings; say what was there already."""
    from lowmem_db.cli.arguments import read_arguments
    from lowmem_db.cli.inputs import check_inputs

    config, _ = read_arguments(arguments or [])
    check_inputs(config)

    from lowmem_db import environment
    from lowmem_db.console import say
    from lowmem_db.models.finding import model_of
    from lowmem_db.preparation.prepare import check_photos, check_prompts
    from lowmem_db.preparation.prepare import prepare as prepare_data

    device = environment.resolve_device(config.device)
    photos = check_photos(config)
    model = model_of(config)
    check_prompts(config, model, photos)
    batches = prepare_data(config, model, device, photos)
    say(
        f"ready: {len(batches.instance_images)} photos, {len(batches.class_images)} class images, in {config.cache_dir}"
    )
