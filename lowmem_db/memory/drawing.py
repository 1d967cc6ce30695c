"""Models that do not train, for drawing and for embeddings: on the device, or streamed through it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lowmem_db.host_memory import to_device
from lowmem_db.memory import checkpointing
from lowmem_db.memory.weight_stream import WeightStream
from lowmem_db.models.families import Family
from lowmem_db.models.families.blocks import Block
from lowmem_db.models.loading import CPU

Load = Callable[[str, torch.device], nn.Module]
"""Loads a component onto a device."""


def load_all(
    family: Family, names: tuple[str, ...], load: Load, device: torch.device, *, streamed: bool
) -> dict[str, Any]:
    """Return components by name, ready to compute on a device.

    Args:
        family: Their family.
        names: Their names.
        load: Loads one.
        device: The device.
        streamed: Keep the weights of their blocks in host memory, and bring them to the device part by part.
    """
    if not streamed:
        return {name: load(name, device) for name in names}
    modules = {name: load(name, device if device.type == "meta" else CPU) for name in names}
    placements = {name: _placements(family.blocks({name: module})) for name, module in modules.items()}
    whole = [name for name, placement in placements.items() if set(placement.values()) == {"none"}]
    modules |= {name: load(name, device) for name in whole}  # such as a T5 that reads its layers from the file
    streamed_modules = {name: module for name, module in modules.items() if name not in whole}
    if streamed_modules:
        stream(family.blocks(streamed_modules), streamed_modules, device)
    return modules


def stream(blocks: Mapping[str, Block], modules: Mapping[str, nn.Module], device: torch.device) -> None:
    """Let the weights of models stream, segment by segment where the family knows segments, else layer by layer.

    Args:
        blocks: The blocks of the models, by name.
        modules: The models, by component, in host memory; changed in place.
        device: The device that they compute on.
    """
    weights = WeightStream(device, trained=True)
    checkpointing.apply(blocks, _placements(blocks), stream=weights)
    weights.begin(modules)
    for module in modules.values():
        to_device(module, device)


def _placements(blocks: Mapping[str, Block]) -> dict[str, str]:
    return {name: _finest(block) for name, block in blocks.items()}


def _finest(block: Block) -> str:
    def probe(function: Callable[..., Any], part: nn.Module, *, is_outer: bool = True) -> Callable[..., Any]:
        del part, is_outer
        return function

    return next((kind for kind in ("segments", "layers") if block.replacements(kind, probe) is not None), "none")
