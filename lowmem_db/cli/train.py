"""``lowmem-db train``."""

from typing import Annotated

import typer

from lowmem_db.config import shipped


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [section.key=value]... [--flag value]...",
            help="A configuration (a YAML file, or a name that [bold]lowmem-db configs[/bold] lists), values of its "
            "fields, and the flags of diffusers' scripts for DreamBooth and Textual Inversion.",
            show_default=False,
            autocompletion=shipped.names,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the newest complete checkpoint in output_dir; start if there is none."
        ),
    ] = False,
) -> None:
    """Fine-tune a model on photos of a subject.

    [bold]lowmem-db train demo[/bold] trains the small model of this package on the bundled photos.
    Fields can be overridden ([bold]training.learning_rate=2e-6[/bold]). No configuration file is needed:

    lowmem-db train --pretrained_model_name_or_path MODEL --instance_data_dir PHOTOS --output_dir runs/dog
    --instance_prompt "a photo of sks dog" --with_prior_preservation --class_prompt "a photo of dog"

    docs/configuration.md describes every field. Ctrl-C saves a checkpoint; --resume continues from it.
    Commands for diffusers' train_dreambooth.py, train_dreambooth_lora.py and textual_inversion.py can be pasted after
    lowmem-db train.
    """
    from lowmem_db.cli.arguments import read_arguments

    request = read_arguments(arguments or [], resume=resume)

    from lowmem_db import api

    api.train(request.config, resume=request.resume, step=request.step)
