"""Building an optimizer from the configuration."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from lowmem_db_kernels.codec import BLOCK_SIZE
from torch import Tensor, nn

from lowmem_db.config.schema import Config, Weights
from lowmem_db.config.strategy import autocast, check_resolved
from lowmem_db.distributed.reduction import NO_REDUCTION, Reduction
from lowmem_db.distributed.shards import can_be_shared, is_shared, own
from lowmem_db.errors import ConfigError
from lowmem_db.optimizers.adafactor import Adafactor
from lowmem_db.optimizers.adamw import AdamW
from lowmem_db.optimizers.adamw8bit import AdamW8bit
from lowmem_db.optimizers.clipping import GradientClipping, LossScale
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.in_backward import InBackwardHandle
from lowmem_db.optimizers.on_host import HostStep
from lowmem_db.optimizers.rules import Sums, UpdateRule
from lowmem_db.optimizers.states import ResidentStates, StateLayout, States, like
from lowmem_db.optimizers.streaming import StreamedStates
from lowmem_db.optimizers.units import LargeParameter, SmallParameterRow, StepUnit
from lowmem_db.optimizers.weights import EXTRA_BITS, named_parameters
from lowmem_db.randomness import derive_seed

_HOST = torch.device("cpu")
_AT_ONCE = 64  # elements; the vectors of a CPU are shorter
_LARGEST_SMALL = 4095  # elements; bitsandbytes keeps fp32 states up to this size


def build_optimizer(
    config: Config,
    modules: Mapping[str, nn.Module],
    device: torch.device,
    reduction: Reduction = NO_REDUCTION,
    on_host: Mapping[nn.Parameter, Tensor] | None = None,
) -> OptimizerHandle:
    """Build the optimizer of a configuration, with a group for each component that trains.

    Args:
        config: The resolved configuration; the modules already have its weight format.
        modules: The components, by name.
        device: Device of the modules.
        reduction: Adds up the gradients of all processes. Default: there is one.
        on_host: The weights that are on the host, where they are. Default: none.

    Raises:
        ConfigError: Nothing trains.
        ValueError: The configuration leaves a field open.
    """
    check_resolved(config)
    rule = _RULES[config.optimizer.name](config, device)
    units = _units(config, rule, modules, device, reduction)
    step = _host_step(config, units, on_host or {}, device) if config.memory.optimizer_step == "host" else None
    kind = partial(InBackwardHandle, on_host=step) if config.memory.optimizer_in_backward else OptimizerHandle
    return kind(
        units,
        rule,
        clipping=GradientClipping(config.training.clipping or "none", config.training.max_grad_norm, device),
        loss_scale=LossScale(device) if autocast(config) == "fp16" else None,
        device=device,
        reduction=reduction,
    )


def _host_step(
    config: Config, units: Sequence[StepUnit], on_host: Mapping[nn.Parameter, Tensor], device: torch.device
) -> HostStep:
    rule = _RULES[config.optimizer.name](config, _HOST)
    return HostStep([unit for unit in units if isinstance(unit, LargeParameter)], rule, on_host, device)


def _adamw8bit(config: Config, device: torch.device) -> UpdateRule:
    leaves_out_overflow = bool(config.memory.optimizer_in_backward) and autocast(config) == "fp16"
    return AdamW8bit(config.optimizer, device, leaves_out_overflow=leaves_out_overflow)


_RULES: dict[str, Callable[[Config, torch.device], UpdateRule]] = {
    "adamw": lambda config, device: AdamW(config.optimizer),
    "adamw8bit": _adamw8bit,
    "adafactor": lambda config, device: Adafactor(config.optimizer),
}


def stays_whole(parameter: Tensor, config: Config) -> bool:
    """Return whether every process keeps the whole of a parameter where ``distributed.sharding`` shares them out.

    Small ones stay, which are stepped in one row; and those whose rows cannot be shared out without separating what an
    8-bit state scales together, or what torch computes at once: it may round what is left over at an end otherwise.
    """
    block = BLOCK_SIZE if config.optimizer.name == "adamw8bit" else _AT_ONCE
    is_small = parameter.numel() <= _LARGEST_SMALL
    return is_small or not can_be_shared(parameter.shape, config.distributed.num_processes, block)


def _units(
    config: Config, rule: UpdateRule, modules: Mapping[str, nn.Module], device: torch.device, reduction: Reduction
) -> list[StepUnit]:
    trained = _trained_parameters(modules)
    large = {name: parameter for name, parameter in trained.items() if parameter.numel() > _LARGEST_SMALL}
    rows = _rows({name: parameter for name, parameter in trained.items() if name not in large})
    layout = partial(_layout, rule, extra_bits=config.memory.weights == "bf16_extra_bits")
    large_states = _states({name: layout(own(each), small=False) for name, each in large.items()}, config, device)
    row_states = ResidentStates({name: layout(_in_a_row(row), small=True) for name, row in rows.items()}, device)
    seed = partial(_rounding_seed, config.seed, config.memory.weights)
    return [
        *(LargeParameter(name, each, large_states, seed(name), _sums(each, reduction)) for name, each in large.items()),
        *(SmallParameterRow(name, row, row_states, seed(name)) for name, row in rows.items()),
    ]


def _sums(parameter: nn.Parameter, reduction: Reduction) -> Sums | None:
    return Sums(parameter.numel(), reduction.total) if is_shared(parameter) else None


def _states(layouts: Mapping[str, StateLayout], config: Config, device: torch.device) -> States:
    """Return the states of large parameters; where weights stream too, the smallest ring will do."""
    if config.memory.optimizer_step == "host":
        return ResidentStates(layouts, device, on_host=True)
    if not config.memory.stream_optimizer_state:
        return ResidentStates(layouts, device)
    largest = max((layout.nbytes for layout in layouts.values()), default=0)
    return StreamedStates(layouts, device, ring_bytes=largest if config.memory.stream_weights else None)


def _trained_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    trained = {name: parameter for name, parameter in named_parameters(modules).items() if parameter.requires_grad}
    if not trained:
        raise ConfigError(f"{', '.join(modules)}: no parameter is trainable")
    return trained


def _rows(small: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
    """Return the small parameters of each component."""
    rows: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in small.items():
        rows.setdefault(f"{name.partition('.')[0]}.small", {})[name] = parameter
    return rows


def _in_a_row(row: Mapping[str, nn.Parameter]) -> Tensor:
    """Return a tensor with the shape of a row of parameters."""
    return torch.empty(sum(parameter.numel() for parameter in row.values()), device="meta")


def _layout(rule: UpdateRule, parameter: Tensor, *, small: bool, extra_bits: bool) -> StateLayout:
    tensors = list(rule.state_tensors(parameter, small=small))
    return StateLayout([*tensors, like(parameter, EXTRA_BITS, torch.int8)] if extra_bits else tensors)


def _rounding_seed(seed: int, weights: Weights | None, name: str) -> int | None:
    return derive_seed(seed, f"rounding of {name}") if weights == "bf16_stochastic" else None
