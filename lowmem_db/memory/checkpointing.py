"""Gradient checkpointing (arXiv:1604.06174): activations are recomputed in the backward pass instead of kept.

A checkpointed part of a model is a segment: its inputs are kept, what it computes inside is not. Losses and gradients
stay the same bit for bit. Which parts are segments is a choice per block of the model, whose family knows its parts:

* ``none``: nothing is recomputed.
* ``layers``: each resnet and each transformer block, as diffusers does by itself.
* ``segments``: each resnet together with the concatenation of its skip connection, each transformer block together with
  the norm and the projections of its transformer where it is the first or the last, each down- and upsampler.
* ``nested``: as ``segments``, but each transformer is one segment as a whole, and its parts are segments inside it:
  transformer blocks, or the attentions of a single one. They are recomputed twice.

A text encoder is one block; every placement but ``none`` makes each of its layers a segment.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

from lowmem_db.memory.boundary_offload import BoundaryOffload
from lowmem_db.memory.segments import Segment
from lowmem_db.models.families.blocks import Block, Recomputing, Replacement

PLACEMENTS = ("none", "layers", "segments", "nested")


def apply(
    blocks: Mapping[str, Block], placement: str | Mapping[str, str], *, offload: bool = False
) -> Callable[[], None]:
    """Let parts of models be recomputed in the backward pass.

    Args:
        blocks: The blocks of what trains, by name; their modules are changed in place, the state dicts stay.
        placement: ``none``, ``layers``, ``segments`` or ``nested``; or one per block name, where blocks left out have
            ``none``.
        offload: Keep the inputs of segments on the host, see :mod:`lowmem_db.memory.boundary_offload`.

    Returns:
        A function that restores the models as they were.

    Raises:
        ValueError: A name is no block, a placement does not exist, a block is not known to the placement, or
            checkpointing is applied already.
    """
    placements = _placements(blocks, placement)
    if any(_is_checkpointed(part) for block in blocks.values() for part in block.module.modules()):
        components = dict.fromkeys(name.partition(".")[0] for name in blocks)
        raise ValueError(f"checkpointing is applied already to {', '.join(components)}; undo it first")
    keeping = BoundaryOffload().keeping if offload else nullcontext
    replacements = [
        replacement
        for name, block in blocks.items()
        if placements[name] != "none"
        for replacement in _replacements(name, block, placements[name], keeping)
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


def _replacements(name: str, block: Block, placement: str, keeping: Callable[[], Any]) -> list[Replacement]:
    def segment(function: Callable[..., Any], part: nn.Module, *, is_outer: bool = True) -> Segment:
        return Segment(function, part, keeping) if is_outer else Segment(function, part)

    found = block.replacements(placement, segment)
    if found is None:
        raise ValueError(
            f"checkpointing of {name}: {placement!r} does not know {type(block.module).__name__}; "
            f"choose another placement for this block, such as 'none'"
        )
    return found


def _placements(blocks: Mapping[str, Block], placement: str | Mapping[str, str]) -> dict[str, str]:
    chosen = dict.fromkeys(blocks, placement) if isinstance(placement, str) else dict(placement)
    for name, value in chosen.items():
        if name not in blocks:
            raise ValueError(f"{name!r} is no block; the blocks are {', '.join(blocks)}")
        if value not in PLACEMENTS:
            raise ValueError(f"checkpointing of {name}: {value!r} is no placement; choose {', '.join(PLACEMENTS)}")
    return dict.fromkeys(blocks, "none") | chosen
