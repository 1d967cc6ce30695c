"""``lowmem-db train``."""

from typing import Annotated

import typer


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [section.key=value]... [--flag value]...",
            help="A configuration file, fields of it, and the flags of diffusers' train_dreambooth.py as they are.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the newest complete checkpoint of output_dir, or start where there is none."
        ),
    ] = False,
) -> None:
    """Fine-tune a model on photos of a subject.

    [bold]lowmem-db train configs/demo.yaml[/bold] trains the small model in this package on the bundled photos;
    fields can be overridden ([bold]training.learning_rate=2e-6[/bold]), and a configuration file is not needed:

    lowmem-db train --pretrained_model_name_or_path MODEL --instance_data_dir PHOTOS --output_dir runs/dog
    --instance_prompt "a photo of sks dog" --with_prior_preservation --class_prompt "a photo of dog"

    Every field with its meaning is in docs/configuration.md. Ctrl-C saves a checkpoint; --resume goes on.
    """
    from lowmem_db.cli.arguments import read_arguments

    config, resume_flag = read_arguments(arguments or [])

    from lowmem_db import api

    api.train(config, resume=resume or resume_flag)
