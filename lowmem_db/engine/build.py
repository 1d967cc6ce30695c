"""From a configuration to what one training step needs: the model in its memory strategy, the loss, the optimizer."""

import torch

from lowmem_db.adaptation import layers, low_rank, quantized
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import Strategy, plain_strategy
from lowmem_db.errors import ConfigError
from lowmem_db.memory import attention, checkpointing
from lowmem_db.models.denoiser import AUTOCAST_TYPES, Denoiser
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.models.saving import DTYPES
from lowmem_db.objective.objective import Objective
from lowmem_db.optimizers import weights
from lowmem_db.optimizers.build import build_optimizer
from lowmem_db.optimizers.ema import ExponentialMovingAverage
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.weights import named_parameters


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
        ConfigError: ``memory.checkpointing`` names a block that the model does not have, or another field
            cannot be combined with it.
    """
    _check_fields(config, model)
    # fp32 weights meet the device in the kind that trains
    denoiser = _load_denoiser(config, strategy, model, device if device.type == "meta" else CPU)
    extra_bits = weights.apply(denoiser.modules(), strategy.weights)
    _choose_what_trains(config, strategy, denoiser)
    for module in denoiser.modules().values():
        module.to(device).train()
    attention.apply(denoiser.module, config.memory.attention, device)
    try:
        checkpointing.apply(denoiser.blocks(), strategy.checkpointing, offload=strategy.offload_checkpoints)
    except ValueError as error:
        raise ConfigError(f"memory.checkpointing: {error}") from error
    optimizer = build_optimizer(config, strategy, denoiser.modules(), device)
    for name, bits in optimizer.extra_bits().items():
        bits.copy_(extra_bits.pop(name))
    if device.type != "meta":
        optimizer.keep_extra_bits(extra_bits)  # of layers that do not train: the final model has them again
    return denoiser, _build_objective(config, model, device), optimizer


def _load_denoiser(config: Config, strategy: Strategy, model: ModelFolder, device: torch.device) -> Denoiser:
    family, dtype = model.family, _loaded_dtype(strategy)
    names = [family.denoiser, *(family.text_encoders if config.training.train_text_encoder else ())]
    modules = {name: model.load(name, device, dtype) for name in names}
    return Denoiser(family, modules, AUTOCAST_TYPES[strategy.autocast])


def on_meta(config: Config, model: ModelFolder) -> Denoiser:
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
    low_rank.attach(modules, config.lora, seed=config.seed)


def _check_fields(config: Config, model: ModelFolder) -> None:
    """Refuse what the rules of the configuration cannot see: fields that this model has no use for."""
    rate = config.training.learning_rate_text_encoder_2
    if rate is not None and len(model.family.text_encoders) < 2:
        raise ConfigError(
            f"training.learning_rate_text_encoder_2: {rate} has no use with {model.family.name}, which has no second "
            "text encoder; leave it out"
        )


def _build_objective(config: Config, model: ModelFolder, device: torch.device) -> Objective:
    return Objective(
        config.objective,
        process=model.family.process(model, config.objective),
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


def set_arithmetic(config: Config, device: torch.device) -> None:
    """Let CUDA compute the same bits each time, in TF32 only where that is asked for."""
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.training.allow_tf32
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else every new tensor is filled before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
