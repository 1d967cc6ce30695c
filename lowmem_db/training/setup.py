"""From a configuration and prepared data to a trainer, and from a trained model to ``final/``."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image

from lowmem_db import environment
from lowmem_db.config.schema import Config, Weights
from lowmem_db.config.strategy import Strategy, plain_strategy
from lowmem_db.console import say
from lowmem_db.data.batches import BatchSource
from lowmem_db.errors import ConfigError, StorageError
from lowmem_db.memory import attention, checkpointing
from lowmem_db.models import layers, lora, quantized
from lowmem_db.models.denoiser import AUTOCAST_TYPES, Denoiser
from lowmem_db.models.loading import CPU, load_noise_schedule, load_text_encoder, load_text_encoder_2, load_unet
from lowmem_db.models.lora_file import LORA_FILE, lora_file, write_lora
from lowmem_db.models.saving import DTYPES, save_model
from lowmem_db.models.source import ModelFolder
from lowmem_db.objective.objective import Objective
from lowmem_db.optimizers import weights
from lowmem_db.optimizers.build import build_optimizer
from lowmem_db.optimizers.ema import ExponentialMovingAverage
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.weights import named_parameters
from lowmem_db.storage import hub
from lowmem_db.storage.atomic import write_folder
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.samples import draw_images, draw_samples
from lowmem_db.training.trainer import Trainer

_WEIGHT_BYTES: dict[Weights, int] = {"fp32": 4, "bf16_extra_bits": 3, "bf16_stochastic": 2}  # per parameter
_STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1}


def check_machine(config: Config, device: torch.device) -> None:
    """Refuse what this machine cannot do, before a model is looked for.

    Raises:
        ConfigError: The device cannot compute in ``training.mixed_precision``.
        DependencyError: A library that was asked for is missing, or ``LOWMEM_DB_KERNELS`` asks for what cannot serve.
        StorageError: The final model shall be uploaded and nobody is logged in.
    """
    environment.check_precision(config.training.mixed_precision or "no", device)
    attention.check(config.memory.attention, device)
    environment.check_kernels()
    if config.lora.enabled:
        environment.require("peft")
        quantized.check_device(config.lora.base_weights, device)
    if config.logging.tensorboard:
        environment.require("tensorboard")
    if config.final.push_to_hub:
        hub.check_login()


def check_disk(config: Config, model: ModelFolder) -> None:
    """Refuse a run whose checkpoints and final model do not fit the disk.

    Raises:
        StorageError: The disk is too small.
    """
    needed = disk_bytes(config, model)
    free = environment.free_disk_bytes(config.output_dir) + _bytes_to_be_replaced(config.output_dir)
    if needed > free:
        raise StorageError(
            f"output_dir: {config.output_dir} needs {needed / environment.GIB:.1f} GiB for checkpoints and the final "
            f"model, and {free / environment.GIB:.1f} GiB are free; lower checkpointing.keep, or choose another disk"
        )


def _bytes_to_be_replaced(output_dir: Path) -> int:
    """Return the bytes of checkpoints and final model that stand there already, as when a run goes on."""
    run = RunFolder(output_dir)
    files = [file for folder in (run.checkpoints_dir, run.final_dir) for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def disk_bytes(config: Config, model: ModelFolder) -> int:
    """Return the most bytes that checkpoints and the final model of a run take on the disk at once."""
    if config.lora.enabled:
        parameters = sum(layers.count_trained(_on_meta(config, model).modules()).values())
        whole_model = parameters * 4
    else:
        names = ["unet", *(model.family.text_encoders if config.training.train_text_encoder else ())]
        parameters = sum(model.num_parameters(name) for name in names)
        whole_model = sum(model.num_parameters(name) for name in model.family.with_weights) * 4
    per_parameter = (
        _WEIGHT_BYTES[config.memory.weights or "fp32"]
        + _STATE_BYTES[config.optimizer.name]
        + (4 if config.ema.enabled else 0)
    )
    at_once = min(config.checkpointing.keep or config.training.max_train_steps, _num_checkpoints(config)) + 1
    at_once += config.evaluation.every is not None and config.evaluation.keep_best
    return int(parameters * per_parameter * at_once + whole_model)


def build_trainer(
    config: Config,
    model: ModelFolder,
    device: torch.device,
    batches: BatchSource,
    run: RunFolder,
    score_images: Callable[[Mapping[str, list[Image]]], Mapping[str, float]] | None = None,
) -> Trainer:
    """Load what trains onto the device and put the trainer together.

    Args:
        config: The configuration.
        model: The model.
        device: Where it trains.
        batches: All batches of the run.
        run: The run folder.
        score_images: Called with images of each prompt when ``evaluation.every`` says so; returns what
            :meth:`lowmem_db.training.scores.Scores.add` takes.
    """
    _set_arithmetic(config, device)
    denoiser, objective, optimizer = build_step(config, plain_strategy(config), model, device)
    ema = build_ema(config, denoiser, optimizer)
    _say_what_trains(model, denoiser, device)
    sampler = partial(draw_samples, config, model, denoiser, batches.prompts, run)

    def score() -> Mapping[str, float]:
        assert score_images is not None
        return score_images(dict(draw_images(config, model, denoiser, batches.prompts, sorted(config.prompts_scored))))

    return Trainer(
        config, run, denoiser, objective, optimizer, batches, ema, sampler, None if score_images is None else score
    )


def build_step(
    config: Config, strategy: Strategy, model: ModelFolder, device: torch.device
) -> tuple[Denoiser, Objective, OptimizerHandle]:
    """Build what one training step needs.

    Args:
        config: The configuration.
        strategy: How memory is saved.
        model: The model; on the meta device its configuration files are enough.
        device: Where the step runs.

    Raises:
        ConfigError: ``memory.checkpointing`` names a block that the model has not, or another field goes not with it.
    """
    _check_fields(config, model)
    # fp32 weights meet the device in the kind that trains
    denoiser = _load_denoiser(config, strategy, model, device if device.type == "meta" else CPU)
    extra_bits = weights.apply(denoiser.modules(), strategy.weights)
    _choose_what_trains(config, strategy, denoiser)
    for module in denoiser.modules().values():
        module.to(device).train()
    attention.apply(denoiser.unet, config.memory.attention, device)
    try:
        checkpointing.apply(denoiser.modules(), strategy.checkpointing, offload=strategy.offload_checkpoints)
    except ValueError as error:
        raise ConfigError(f"memory.checkpointing: {error}") from error
    optimizer = build_optimizer(config, strategy, denoiser.modules(), device)
    for name, bits in optimizer.extra_bits().items():
        bits.copy_(extra_bits.pop(name))
    if device.type != "meta":
        optimizer.keep_extra_bits(extra_bits)  # of layers that do not train: the final model has them again
    return denoiser, _build_objective(config, model, device), optimizer


def _load_denoiser(config: Config, strategy: Strategy, model: ModelFolder, device: torch.device) -> Denoiser:
    dtype, trains_text = _loaded_dtype(strategy), config.training.train_text_encoder
    return Denoiser(
        load_unet(model, device, dtype),
        load_text_encoder(model, device, dtype) if trains_text else None,
        AUTOCAST_TYPES[strategy.autocast],
        load_text_encoder_2(model, device, dtype) if trains_text and model.family.has_text_encoder_2 else None,
    )


def _on_meta(config: Config, model: ModelFolder) -> Denoiser:
    """Return the denoiser without weights, with what trains in it."""
    strategy = plain_strategy(config)
    denoiser = _load_denoiser(config, strategy, model, torch.device("meta"))
    _choose_what_trains(config, strategy, denoiser)
    return denoiser


def _loaded_dtype(strategy: Strategy) -> torch.dtype:
    """Return the type that weights are loaded in: fp32 for those that train, else the type they are frozen in."""
    if strategy.base_weights is None:
        return torch.float32
    return DTYPES.get(strategy.base_weights) or AUTOCAST_TYPES[strategy.autocast] or torch.float32


def _choose_what_trains(config: Config, strategy: Strategy, denoiser: Denoiser) -> None:
    """Let weights train, or freeze them and let adapters train.

    Raises:
        ConfigError: ``training.layers`` or ``lora.targets`` selects nothing.
    """
    modules = denoiser.modules()
    if not config.lora.enabled:
        layers.train_layers(modules, config.training.layers)
        return
    if strategy.base_weights == "int8" or strategy.base_weights == "nf4":
        quantized.quantize(modules.values(), strategy.base_weights, _loaded_dtype(strategy))
    lora.attach(modules, config.lora, seed=config.seed)


def _check_fields(config: Config, model: ModelFolder) -> None:
    """Refuse what the rules of the configuration cannot see: fields that this model has no use for."""
    rate = config.training.learning_rate_text_encoder_2
    if rate is not None and not model.family.has_text_encoder_2:
        raise ConfigError(
            f"training.learning_rate_text_encoder_2: {rate} has no use with {model.family.name}, which has one text "
            "encoder; leave it out"
        )


def _build_objective(config: Config, model: ModelFolder, device: torch.device) -> Objective:
    chosen = config.objective
    noise_schedule = load_noise_schedule(model, chosen.prediction_type, chosen.zero_terminal_snr)
    if noise_schedule.config["rescale_betas_zero_snr"] and noise_schedule.config["prediction_type"] == "epsilon":
        raise ConfigError(
            "objective.prediction_type: this model's scheduler says epsilon, and there is none to predict at a last "
            "timestep that is all noise (zero terminal SNR); set objective.prediction_type=v_prediction, or "
            "objective.zero_terminal_snr=false"
        )
    return Objective(
        config.objective,
        alphas_cumprod=noise_schedule.alphas_cumprod,
        prediction_type=noise_schedule.config["prediction_type"],
        prior_loss_weight=config.prior.loss_weight,
        seed=config.seed,
        device=device,
    )


def build_ema(config: Config, denoiser: Denoiser, optimizer: OptimizerHandle) -> ExponentialMovingAverage | None:
    """Build the moving average of the weights, where the configuration asks for it."""
    if not config.ema.enabled:
        return None
    named = named_parameters(denoiser.modules())
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    return ExponentialMovingAverage(parameters, optimizer.extra_bits, decay=config.ema.decay)


def write_final(trainer: Trainer, model: ModelFolder) -> None:
    """Write ``final/``, for ``from_pretrained`` or, a LoRA, ``load_lora_weights``; upload it where that is asked for.

    Raises:
        StorageError: The disk is full, or the upload failed.
    """
    write_folder(trainer.run.final_dir, partial(_save_final, trainer, model))
    if trainer.config.final.push_to_hub:
        model_id = trainer.config.final.hub_model_id or trainer.config.output_dir.absolute().name
        say(f"uploaded to {hub.upload_model(trainer.run.final_dir, model_id)}")


def _save_final(trainer: Trainer, model: ModelFolder, folder: Path) -> None:
    config, modules = trainer.config, trainer.denoiser.modules()
    dtype = DTYPES[config.final.precision]
    extra_bits = trainer.optimizer.extra_bits()
    if trainer.ema is not None:  # the average has all bits of what it averages
        extra_bits = {name: bits for name, bits in extra_bits.items() if name not in trainer.ema.parameters}
    with nullcontext() if trainer.ema is None else trainer.ema.applied(torch.float32):
        if config.lora.enabled:
            base = config.model.model_dump()
            write_lora(folder / LORA_FILE, lora_file(modules, lora.peft_settings(config.lora), dtype=dtype, base=base))
        else:
            save_model(
                folder,
                model,
                modules,
                dtype=dtype,
                prediction_type=config.objective.prediction_type,
                zero_terminal_snr=config.objective.zero_terminal_snr,
                extra_bits=extra_bits,
            )


def _set_arithmetic(config: Config, device: torch.device) -> None:
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.training.allow_tf32
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else every new tensor is filled before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _num_checkpoints(config: Config) -> int:
    last = config.training.max_train_steps
    intervals = [config.checkpointing.every, config.evaluation.every]
    intervals += [config.sampling.every] if config.sampling.prompts else []
    return len({last} | {step for every in intervals if every for step in range(every, last + 1, every)})


def _say_what_trains(model: ModelFolder, denoiser: Denoiser, device: torch.device) -> None:
    trained = ", ".join(f"{name} {count:,}" for name, count in layers.count_trained(denoiser.modules()).items())
    if (note := environment.reference_paths()) is not None:
        say(note)
    say(f"training {model.name} ({model.family.name}) on {device}: {trained} parameters train")
