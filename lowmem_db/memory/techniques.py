"""The memory techniques as a list: each one's fields in the configuration, and how it is applied to a model.

A technique from outside this package is registered with :func:`register`; ``memory.techniques`` then accepts its name.
A technique of this package has its own field in ``memory`` and is listed in :data:`TECHNIQUES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowmem_db.config import strategy
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import StrategyField
from lowmem_db.errors import ConfigError
from lowmem_db.memory import attention, channels_last, checkpointing, compiling, fused_layers
from lowmem_db.memory.weight_stream import WeightStream
from lowmem_db.models.denoiser import Denoiser

Undo = Callable[[], None]


def _nothing(config: Config, device: torch.device) -> None:
    del config, device


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A way to save memory in a model.

    Attributes:
        fields: Paths of the configuration fields it reads; those that the planner may choose are declared in
            :mod:`lowmem_db.config.strategy`, with choices, words, cost and effect.
        apply: Applies it to a model as a resolved configuration says, and returns the function that undoes it.
        check: Raises if the machine cannot do what a configuration asks for; called before anything is loaded.
    """

    fields: tuple[str, ...]
    apply: Callable[[Denoiser, Config, torch.device], Undo]
    check: Callable[[Config, torch.device], None] = _nothing


def _attention(denoiser: Denoiser, config: Config, device: torch.device) -> Undo:
    return attention.apply(denoiser.module, config.memory.attention, device)


def _channels_last(denoiser: Denoiser, config: Config, device: torch.device) -> Undo:
    del device
    return channels_last.apply(denoiser.module) if config.memory.channels_last else _leave


def _fused_layers(denoiser: Denoiser, config: Config, device: torch.device) -> Undo:
    del device
    if not config.memory.fused_layers:
        return _leave
    try:
        return fused_layers.apply(denoiser.module)
    except ValueError as error:
        raise ConfigError(f"memory.fused_layers: {error}; set memory.fused_layers=false") from error


def _compiling(denoiser: Denoiser, config: Config, device: torch.device) -> Undo:
    if not config.training.compile or device.type == "meta":
        return _leave
    try:
        return compiling.apply(*denoiser.modules().values())
    except ValueError as error:
        raise ConfigError(f"training.compile: {error}; set training.compile=false") from error


def _checkpointing(denoiser: Denoiser, config: Config, device: torch.device) -> Undo:
    placement, offload = config.memory.checkpointing, bool(config.memory.offload_checkpoints)
    stream = _stream(config, device) if config.memory.stream_weights else None
    try:
        undo = checkpointing.apply(denoiser.blocks(), placement or "none", offload=offload, stream=stream)
    except ValueError as error:
        raise ConfigError(f"memory.checkpointing: {error}") from error
    if stream is None:
        return undo
    stream.begin(denoiser.modules())

    def undo_both() -> None:
        stream.undo()
        undo()

    return undo_both


def _stream(config: Config, device: torch.device) -> WeightStream:
    return WeightStream(device, trained=config.trains_weights, steps_on_host=config.memory.optimizer_step == "host")


def _elsewhere(denoiser: Denoiser, config: Config, device: torch.device) -> Undo:
    """Change nothing in the model: the code that draws samples or prepares data reads the field."""
    del denoiser, config, device
    return _leave


def _leave() -> None:
    """Undo nothing."""


TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        fields=("memory.attention",),
        apply=_attention,
        check=lambda config, device: attention.check(config.memory.attention, device),
    ),
    Technique(fields=("memory.channels_last",), apply=_channels_last),
    Technique(
        fields=("memory.fused_layers",),
        apply=_fused_layers,
        check=lambda config, device: fused_layers.check(device) if config.memory.fused_layers else None,
    ),
    Technique(
        fields=("training.compile",),
        apply=_compiling,
        check=lambda config, device: compiling.check(device) if config.training.compile else None,
    ),
    Technique(
        fields=("memory.checkpointing", "memory.offload_checkpoints", "memory.stream_weights"), apply=_checkpointing
    ),
    Technique(fields=("memory.tiled_samples", "memory.tiled_preparation"), apply=_elsewhere),
)
"""This package's techniques, in the order in which they are applied."""
_registered: list[Technique] = []


def register(field: StrategyField, technique: Technique) -> Undo:
    """Add a technique from outside this package; return what removes it.

    Args:
        field: Its field, ``memory.techniques.NAME``.
        technique: The technique; it is applied after those of this package.

    Raises:
        ValueError: The field is not in ``memory.techniques``, or its name is taken.
    """
    section, _, name = field.path.rpartition(".")
    if section != "memory.techniques" or strategy.is_registered(name):
        raise ValueError(f"{field.path}: allowed: memory.techniques.NAME with a name that is not yet registered")
    forget = strategy.register(field)
    _registered.append(technique)

    def undo() -> None:
        _registered.remove(technique)
        forget()

    return undo


def apply(denoiser: Denoiser, config: Config, device: torch.device) -> Undo:
    """Apply every technique of a resolved configuration to a model; return the function that undoes them all.

    Args:
        denoiser: The model; its modules are changed in place.
        config: The configuration.
        device: Device that it will run on. Its modules are on the host, or there already; those that stay on the host
            are in pinned memory afterwards.

    Raises:
        ConfigError: A technique does not support the model.
        DependencyError: xformers was selected but cannot be used.
    """
    undos = [technique.apply(denoiser, config, device) for technique in (*TECHNIQUES, *_registered)]

    def undo() -> None:
        for one in reversed(undos):
            one()

    return undo


def check(config: Config, device: torch.device) -> None:
    """Refuse a technique that cannot be used here, before anything is loaded.

    Raises:
        DependencyError: A technique cannot be used here; the message says why.
    """
    for technique in (*TECHNIQUES, *_registered):
        technique.check(config, device)
