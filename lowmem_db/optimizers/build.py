"""From the configuration to an optimizer."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lowmem_db.config.schema import Config, OptimizerConfig
from lowmem_db.config.strategy import Strategy
from lowmem_db.errors import ConfigError
from lowmem_db.optimizers.adafactor import Adafactor
from lowmem_db.optimizers.adamw import AdamW
from lowmem_db.optimizers.adamw8bit import AdamW8bit
from lowmem_db.optimizers.clipping import GradientClipping, LossScale
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.in_backward import InBackwardHandle
from lowmem_db.optimizers.rules import UpdateRule
from lowmem_db.optimizers.states import ResidentStates, StateLayout, like
from lowmem_db.optimizers.streaming import StreamedStates
from lowmem_db.optimizers.units import LargeParameter, SmallParameters, StepUnit
from lowmem_db.optimizers.weights import EXTRA_BITS, named_parameters
from lowmem_db.randomness import derive_seed

_LARGEST_SMALL = 4095  # elements; bitsandbytes keeps fp32 states up to this size


def build_optimizer(
    config: Config, strategy: Strategy, modules: Mapping[str, nn.Module], device: torch.device
) -> OptimizerHandle:
    """Build the optimizer of a configuration, a group for each module.

    Args:
        config: The configuration.
        strategy: How memory is saved; the modules have its kind of weights.
        modules: What trains, by the name of its component.
        device: Where the modules are.

    Raises:
        ConfigError: A module has nothing to train.
    """
    rule = _rule(config.optimizer, device)
    kind = InBackwardHandle if strategy.optimizer_in_backward else OptimizerHandle
    return kind(
        _units(config, strategy, rule, modules, device),
        rule,
        clipping=GradientClipping(strategy.clipping, config.training.max_grad_norm, device),
        loss_scale=LossScale(device) if strategy.autocast == "fp16" else None,
        device=device,
    )


def _rule(config: OptimizerConfig, device: torch.device) -> UpdateRule:
    if config.name == "adamw8bit":
        return AdamW8bit(config, device)
    return AdamW(config) if config.name == "adamw" else Adafactor(config)


def _units(
    config: Config, strategy: Strategy, rule: UpdateRule, modules: Mapping[str, nn.Module], device: torch.device
) -> list[StepUnit]:
    trained = {name: each for name, each in named_parameters(modules).items() if each.requires_grad}
    for component in modules:
        if not any(name.startswith(f"{component}.") for name in trained):
            raise ConfigError(f"{component}: has no parameter that trains")
    large = {name: each for name, each in trained.items() if each.numel() > _LARGEST_SMALL}
    rows: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in trained.items():
        if name not in large:
            rows.setdefault(f"{name.partition('.')[0]}.small", {})[name] = parameter

    def layout(parameters: Sequence[nn.Parameter], *, small: bool) -> StateLayout:
        whole = torch.empty(sum(each.numel() for each in parameters), device="meta") if small else parameters[0]
        extra = [like(whole, EXTRA_BITS, torch.int8)] if strategy.weights == "bf16_extra_bits" else []
        return StateLayout([*rule.state_tensors(whole, small=small), *extra])

    def rounding_seed(name: str) -> int | None:
        return derive_seed(config.seed, f"rounding of {name}") if strategy.weights == "bf16_stochastic" else None

    of_large = StreamedStates if strategy.stream_optimizer_state else ResidentStates
    large_states = of_large({name: layout([each], small=False) for name, each in large.items()}, device)
    row_layouts = {name: layout(list(row.values()), small=True) for name, row in rows.items()}
    row_states = ResidentStates(row_layouts, device)
    return [
        *(LargeParameter(name, each, large_states, rounding_seed(name)) for name, each in large.items()),
        *(SmallParameters(name, row, row_states, rounding_seed(name)) for name, row in rows.items()),
    ]
