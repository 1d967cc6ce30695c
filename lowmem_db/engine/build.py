"""Building what a training step needs from a configuration: the model, the loss and the optimizer."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowmem_db import nvidia
from lowmem_db.adaptation.base import Adaptation
from lowmem_db.adaptation.finding import find_adaptation
from lowmem_db.adaptation.layers import count_trained, that_train
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import autocast, check_resolved, resolve
from lowmem_db.distributed.reduction import reduction_for
from lowmem_db.distributed.shards import rows_of
from lowmem_db.distributed.world import ALONE, World
from lowmem_db.errors import ConfigError
from lowmem_db.host_memory import to_device
from lowmem_db.memory import sharding, techniques
from lowmem_db.memory.weight_stream import weights_on_host
from lowmem_db.models.denoiser import AUTOCAST_TYPES, Denoiser
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.objective.objective import Objective
from lowmem_db.optimizers.build import build_optimizer, stays_whole
from lowmem_db.optimizers.ema import ExponentialMovingAverage
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.weights import named_parameters


@dataclass(frozen=True)
class Prepared:
    """A loaded model with what trains put into it, before anything saves memory.

    Attributes:
        modules: Its components by name.
        extra_bits: See :class:`lowmem_db.adaptation.base.Attached`.
    """

    modules: dict[str, nn.Module]
    extra_bits: dict[str, Tensor]


def prepare_modules(config: Config, model: ModelFolder, device: torch.device) -> Prepared:
    """Load a model and put what trains into it; the arguments are those of :func:`build_step`."""
    adaptation = find_adaptation(config)
    modules = _load_denoiser(config, adaptation, model, device).modules()
    attached = adaptation.attach(modules)
    return Prepared(modules=dict(modules), extra_bits=attached.extra_bits)


def build_step(
    config: Config,
    model: ModelFolder,
    device: torch.device,
    prepared: Prepared | None = None,
    world: World = ALONE,
) -> tuple[Denoiser, Objective, OptimizerHandle]:
    """Build what one training step needs.

    Args:
        config: The resolved configuration, see :mod:`lowmem_db.config.strategy`.
        model: The model; on the meta device its configuration files are enough.
        device: Device of the step.
        prepared: The model if it is loaded already; it is changed. Default: it is loaded.
        world: The processes that share each step.

    Raises:
        ConfigError: ``memory.checkpointing`` names a block that the model does not have, or another field
            cannot be combined with it.
        ValueError: The configuration leaves a field open.
    """
    check_resolved(config)
    _check_fields(config, model)
    if prepared is None:  # on the host, so that the device never holds weights in another type
        prepared = prepare_modules(config, model, device if device.type == "meta" else CPU)
    denoiser = Denoiser(
        model.family,
        prepared.modules,
        AUTOCAST_TYPES[autocast(config)],
        with_variance=config.objective.variance == "hybrid",
    )
    techniques.apply(denoiser, config, device)
    reduction = reduction_for(world, config)
    is_shared_out = config.distributed.sharding == "full" and world.size > 1
    if is_shared_out:
        sharding.apply(denoiser, device, reduction, partial(stays_whole, config=config))
    for module in denoiser.modules().values():
        if not is_shared_out:
            to_device(module, device)
        module.train()
    trained = that_train(denoiser.modules())
    on_host = weights_on_host(denoiser.modules().values())
    optimizer = build_optimizer(config, trained, device, reduction, on_host)
    extra_bits = {name: bits for name, bits in prepared.extra_bits.items() if name.partition(".")[0] in trained}
    for name, bits in optimizer.extra_bits().items():
        found = extra_bits.pop(name)
        bits.copy_(found if bits.shape == found.shape else found[rows_of(len(found), world.size)[world.rank]])
    if device.type != "meta":
        optimizer.keep_extra_bits(extra_bits)  # of layers that do not train: the final model needs them
    return denoiser, _build_objective(config, model, device), optimizer


def count_on_meta(config: Config, model: ModelFolder) -> dict[str, int]:
    """Return how many parameters of each component will train, without reading weights."""
    resolved = resolve(config)
    adaptation = find_adaptation(resolved)
    denoiser = _load_denoiser(resolved, adaptation, model, torch.device("meta"))
    adaptation.attach(denoiser.modules())
    return count_trained(denoiser.modules())


def _load_denoiser(config: Config, adaptation: Adaptation, model: ModelFolder, device: torch.device) -> Denoiser:
    family, dtype = model.family, adaptation.load_dtype()
    names = [family.denoiser, *(family.text_encoders if config.runs_text_encoders else ())]
    with adaptation.reading():
        modules = {name: model.load(name, device, dtype) for name in names}
    return Denoiser(family, modules, AUTOCAST_TYPES[autocast(config)])


def _check_fields(config: Config, model: ModelFolder) -> None:
    """Refuse what the rules of the configuration cannot know: fields that have no effect on this model."""
    rate = config.training.learning_rate_text_encoder_2
    if rate is not None and len(model.family.text_encoders) < 2:
        raise ConfigError(
            f"training.learning_rate_text_encoder_2: {rate} has no effect on {model.family.name}, which has no second "
            "text encoder; leave it out"
        )


def _build_objective(config: Config, model: ModelFolder, device: torch.device) -> Objective:
    return Objective(
        config.objective,
        process=model.family.process(model, config.objective),
        prior_loss_weight=config.prior.loss_weight,
        seed=config.seed,
        device=device,
        tell=model.family.low_resolution(model, config),
    )


def build_ema(config: Config, denoiser: Denoiser, optimizer: OptimizerHandle) -> ExponentialMovingAverage | None:
    """Build the moving average of the weights, if the configuration asks for it."""
    if not config.ema.enabled:
        return None
    named = named_parameters(denoiser.modules())
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    return ExponentialMovingAverage(parameters, optimizer.extra_bits, decay=config.ema.decay)


def set_arithmetic(config: Config, device: torch.device) -> None:
    """Make CUDA deterministic, and allow TF32 only if the configuration does.

    Preparation, the measured steps of a plan, and training all use it. With ``warn_only``, torch would leave the
    backward pass of attention non-deterministic.

    Raises:
        ConfigError: The environment asks cuBLAS for something else.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.training.allow_tf32
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        nvidia.check_variables()
        torch.use_deterministic_algorithms(True)
        # Otherwise every new tensor would be filled before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
