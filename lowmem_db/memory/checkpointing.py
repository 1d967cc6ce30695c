"""Activation checkpointing (arXiv:1604.06174): activations are recomputed in the backward pass instead of kept.

A checkpointed part of a model is a segment: its inputs are kept, its inner activations are not. Losses and gradients
are bit for bit the same. Which parts are segments is chosen for each block of the model; the family knows its parts:

* ``none``: nothing is recomputed.
* ``layers``: each resnet and each transformer block, as diffusers does by itself.
* ``segments``: each resnet with the concatenation of its skip connection; each transformer block, the first and last
  with the norm and projections of their transformer; each down- and upsampler.
* ``nested``: as ``segments``, but each transformer is one segment, and its parts are segments inside it: its blocks,
  or the attentions of a single block. They are recomputed twice.

A text encoder is one block; every placement except ``none`` makes each of its layers a segment.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

from lowmem_db.memory.boundary_offload import BoundaryOffload
from lowmem_db.memory.segments import Segment
from lowmem_db.memory.weight_stream import WeightStream
from lowmem_db.models.families.blocks import Block, Recomputing, Replacement

PLACEMENTS = ("none", "layers", "segments", "nested")


def apply(
    blocks: Mapping[str, Block],
    placement: str | Mapping[str, str],
    *,
    offload: bool = False,
    stream: WeightStream | None = None,
) -> Callable[[], None]:
    """Make parts of models be recomputed in the backward pass.

    Args:
        blocks: The model's blocks, by name; modules are changed in place, state dicts are not.
        placement: ``none``, ``layers``, ``segments`` or ``nested``; or one for each block name, with ``none`` for
            blocks left out.
        offload: Keep the inputs of segments in host memory, see :mod:`lowmem_db.memory.boundary_offload`.
        stream: Brings the weights of segments to the device once it begins. Default: they are there.

    Returns:
        A function that restores the models.

    Raises:
        ValueError: A block or a placement does not exist, a placement does not support a block, or checkpointing
            has already been applied.
    """
    placements = _placements(blocks, placement)
    if any(_is_checkpointed(part) for block in blocks.values() for part in block.module.modules()):
        components = dict.fromkeys(name.partition(".")[0] for name in blocks)
        raise ValueError(f"checkpointing has already been applied to {', '.join(components)}; undo it first")
    keeping = BoundaryOffload().keeping if offload else nullcontext
    replacements = [
        replacement
        for name, block in blocks.items()
        if placements[name] != "none"
        for replacement in _replacements(name, block, placements[name], keeping, stream)
    ]
    before = [(module, module.__dict__.get("forward")) for module, _ in replacements]
    for module, forward in replacements:
        module.forward = forward
    return partial(_undo, before)


def _undo(before: list[tuple[nn.Module, Callable[..., Any] | None]]) -> None:
    for module, forward in before:
        del module.forward
        if forward is not None:
            module.forward = forward


def _is_checkpointed(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), Segment | Recomputing)


def _replacements(
    name: str, block: Block, placement: str, keeping: Callable[[], Any], stream: WeightStream | None
) -> list[Replacement]:
    def segment(function: Callable[..., Any], part: nn.Module, *, is_outer: bool = True) -> Segment:
        residence = None if stream is None else stream.residence(part)
        return Segment(function, part, keeping if is_outer else nullcontext, residence)

    found = block.replacements(placement, segment)
    if found is None:
        raise ValueError(
            f"checkpointing of {name}: {placement!r} does not support {type(block.module).__name__}; "
            f"choose another placement for this block, such as 'none'"
        )
    return found


def _placements(blocks: Mapping[str, Block], placement: str | Mapping[str, str]) -> dict[str, str]:
    chosen = dict.fromkeys(blocks, placement) if isinstance(placement, str) else dict(placement)
    for name, value in chosen.items():
        if name not in blocks:
            raise ValueError(f"{name!r} is not a block; allowed: {', '.join(blocks)}")
        if value not in PLACEMENTS:
            raise ValueError(f"checkpointing of {name}: {value!r} is not a placement; allowed: {', '.join(PLACEMENTS)}")
    return dict.fromkeys(blocks, "none") | chosen
