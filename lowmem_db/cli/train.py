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

    from lowmem_db import environment
    from lowmem_db.config.loading import to_yaml
    from lowmem_db.config.strategy import with_strategy
    from lowmem_db.console import say
    from lowmem_db.models.layers import count_trained
    from lowmem_db.models.source import find_model
    from lowmem_db.planning.output import summary
    from lowmem_db.planning.plan import plan as plan_run
    from lowmem_db.planning.target import target_of_device
    from lowmem_db.planning.verify import write_measured, write_plan, write_trained
    from lowmem_db.preparation.prepare import check_photos, check_prompts
    from lowmem_db.preparation.prepare import prepare as prepare_data
    from lowmem_db.storage.atomic import write_text
    from lowmem_db.storage.run_folder import RunFolder, write_json
    from lowmem_db.training.resuming import check_run_folder, with_choices_of_run
    from lowmem_db.training.setup import build_trainer, check_disk, check_machine, write_final

    run = RunFolder(config.output_dir)
    with run.locked():
        config = with_choices_of_run(run, config)
        check_run_folder(run, config, resume=resume or resume_flag)
        device = environment.resolve_device(config.device)
        check_machine(config, device)
        photos = check_photos(config)
        model = find_model(**config.model.model_dump())
        plan = plan_run(config, target_of_device(config, device), model=model)
        config = with_strategy(config, plan.strategy)
        say(summary(plan))
        check_disk(config, model)
        check_prompts(config, model, photos)
        write_text(run.config_file, to_yaml(config))
        write_json(run.environment_file, environment.describe())
        write_plan(run, plan)
        trainer = build_trainer(config, model, device, prepare_data(config, model, device, photos), run)
        write_trained(run, count_trained(trainer.denoiser.modules()))
        if resume or resume_flag:
            trainer.resume()
        trainer.train()
        if device.type == "cuda":
            write_measured(run, trainer.peak_step_bytes)
        write_final(trainer, model)
        made = "LoRA" if config.lora.enabled else "model"
        say(f"done: {run.final_dir} is the {made}; draw from it with: lowmem-db generate {run.root}")
