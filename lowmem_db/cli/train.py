"""``lowmem-db train``."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from lowmem_db.config.schema import Config
    from lowmem_db.models.source import ModelFolder
    from lowmem_db.records import ImageRecord
    from lowmem_db.storage.run_folder import RunFolder


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
    from lowmem_db.cli.inputs import check_inputs

    config, resume_flag = read_arguments(arguments or [])
    check_inputs(config)

    from lowmem_db.storage.run_folder import RunFolder

    run = RunFolder(config.output_dir)
    with run.locked():
        config, model, device, photos = _check_and_plan(run, config, resume=resume or resume_flag)
        _train(run, config, model, device, photos, resume=resume or resume_flag)


def _check_and_plan(
    run: "RunFolder", config: "Config", *, resume: bool
) -> "tuple[Config, ModelFolder, torch.device, list[ImageRecord]]":
    """See that the run can be made, and choose how; nothing expensive has happened yet."""
    from lowmem_db import environment
    from lowmem_db.config.loading import to_yaml
    from lowmem_db.config.strategy import with_strategy
    from lowmem_db.console import say
    from lowmem_db.models.source import find_model
    from lowmem_db.planning.output import summary
    from lowmem_db.planning.plan import plan as plan_run
    from lowmem_db.planning.target import target_of_device
    from lowmem_db.planning.verify import write_plan
    from lowmem_db.preparation.prepare import check_photos, check_prompts
    from lowmem_db.storage.atomic import write_text
    from lowmem_db.storage.run_folder import write_json
    from lowmem_db.training.resuming import check_run_folder, with_choices_of_run
    from lowmem_db.training.setup import check_disk, check_machine

    config = with_choices_of_run(run, config)
    check_run_folder(run, config, resume=resume)
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
    return config, model, device, photos


def _train(
    run: "RunFolder",
    config: "Config",
    model: "ModelFolder",
    device: "torch.device",
    photos: "list[ImageRecord]",
    *,
    resume: bool,
) -> None:
    """Prepare the data, train, and leave the final model."""
    from lowmem_db.console import say
    from lowmem_db.environment import release_memory
    from lowmem_db.evaluation.during_training import Scorer
    from lowmem_db.models.layers import count_trained
    from lowmem_db.planning.verify import write_measured, write_trained
    from lowmem_db.preparation.prepare import prepare
    from lowmem_db.training.setup import build_trainer, write_final

    scorer = Scorer(config, [photo.path for photo in photos]) if config.evaluation.every else None
    batches = prepare(config, model, device, photos)
    trainer = build_trainer(config, model, device, batches, run, scorer)
    write_trained(run, count_trained(trainer.denoiser.modules()))
    if resume:
        trainer.resume()
    trainer.train()
    if device.type == "cuda":
        write_measured(run, trainer.peak_step_bytes)
    best = trainer.best_step()
    if best is not None and best != trainer.step:
        say(f"the final model is that of step {best}, which scored best")
        del trainer
        release_memory(device)
        trainer = build_trainer(config, model, device, batches, run)
        trainer.resume(best)
    write_final(trainer, model)
    made = "LoRA" if config.lora.enabled else "model"
    say(f"done: {run.final_dir} is the {made}; draw from it with: lowmem-db generate {run.root}")
