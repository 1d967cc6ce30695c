"""Gradient checkpointing (arXiv:1604.06174): activations are recomputed in the backward pass instead of kept.

A checkpointed part of a model is a segment: its inputs are kept, what it computes inside is not. Losses and gradients
stay the same bit for bit. Which parts are segments is a choice per block of the model:

* ``none``: nothing is recomputed.
* ``layers``: each resnet and each transformer block, as diffusers does by itself.
* ``segments``: each resnet together with the concatenation of its skip connection, each transformer block together with
  the norm and the projections of its transformer where it is the first or the last, each down- and upsampler.
* ``nested``: as ``segments``, but each transformer is one segment as a whole, and its parts are segments inside it:
  transformer blocks, or the attentions of a single one. They are recomputed twice.

A text encoder is one block; every placement but ``none`` makes each of its layers a segment.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

from torch import Tensor, nn

from lowmem_db.memory.boundary_offload import BoundaryOffload
from lowmem_db.memory.segments import Concatenation, Segment

PLACEMENTS = ("none", "layers", "segments", "nested")


class _Replacement(NamedTuple):
    module: nn.Module
    forward: Callable[..., Any]


def block_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the blocks that have a placement of their own.

    Args:
        modules: UNets of diffusers and text encoders of transformers, by component.

    Returns:
        ``unet.down_blocks.0``, ..., ``unet.mid_block``, ``unet.up_blocks.0``, ..., ``text_encoder``.
    """
    return list(_blocks(modules))


def apply(
    modules: Mapping[str, nn.Module], placement: str | Mapping[str, str], *, offload: bool = False
) -> Callable[[], None]:
    """Let parts of models be recomputed in the backward pass.

    Args:
        modules: UNets of diffusers and text encoders of transformers, by component; changed in place, their state dicts
            stay.
        placement: ``none``, ``layers``, ``segments`` or ``nested``; or one per block name, where blocks left out have
            ``none``.
        offload: Keep the inputs of segments on the host, see :mod:`lowmem_db.memory.boundary_offload`.

    Returns:
        A function that restores the models as they were.

    Raises:
        ValueError: A name is no block, a placement does not exist, a block is not known to the placement, or
            checkpointing is applied already.
    """
    placements = _placements(modules, placement)
    if any(_is_checkpointed(part) for module in modules.values() for part in module.modules()):
        raise ValueError(f"checkpointing is applied already to {', '.join(modules)}; undo it first")
    keeping = BoundaryOffload().keeping if offload else nullcontext
    replacements = [
        replacement
        for name, block in _blocks(modules).items()
        for replacement in _Segmenter(name, placements[name], keeping).replacements(block)
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
    forward = module.__dict__.get("forward")
    return isinstance(forward, Segment) or getattr(forward, "func", None) in (_up_block_forward, _transformer_forward)


def _blocks(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    blocks: dict[str, nn.Module] = {}
    for component, module in modules.items():
        blocks.update(_unet_blocks(component, module) if hasattr(module, "down_blocks") else {component: module})
    return blocks


def _unet_blocks(component: str, unet: Any) -> Iterator[tuple[str, nn.Module]]:
    for index, block in enumerate(unet.down_blocks):
        yield f"{component}.down_blocks.{index}", block
    if unet.mid_block is not None:
        yield f"{component}.mid_block", unet.mid_block
    for index, block in enumerate(unet.up_blocks):
        yield f"{component}.up_blocks.{index}", block


def _placements(modules: Mapping[str, nn.Module], placement: str | Mapping[str, str]) -> dict[str, str]:
    names = block_names(modules)
    chosen = dict.fromkeys(names, placement) if isinstance(placement, str) else dict(placement)
    for name, value in chosen.items():
        if name not in names:
            raise ValueError(f"checkpointing: {name!r} is no block; the blocks are {', '.join(names)}")
        if value not in PLACEMENTS:
            raise ValueError(f"checkpointing of {name}: {value!r} is no placement; choose {', '.join(PLACEMENTS)}")
    return dict.fromkeys(names, "none") | chosen


class _Segmenter:
    """Finds what to replace in one block."""

    def __init__(self, name: str, placement: str, keeping: Callable[[], Any]) -> None:
        self.name = name
        self.placement = placement
        self.keeping = keeping

    def replacements(self, block: nn.Module) -> list[_Replacement]:
        if self.placement == "none":
            return []
        if (layers := _text_encoder_layers(block)) is not None:
            return [self.outer(layer) for layer in layers]
        if self.placement == "layers":
            layers = [part for part in block.modules() if _is_resnet(part) or _is_transformer_block(part)]
            return [self.outer(layer) for layer in layers] or self.refuse(block)
        if not _is_unet_block(block):
            self.refuse(block)
        return [*self.resnets(block), *self.transformers(block), *self.samplers(block)]

    def refuse(self, block: nn.Module) -> list[_Replacement]:
        raise ValueError(
            f"checkpointing of {self.name}: {self.placement!r} does not know {type(block).__name__}; "
            f"choose another placement for this block, such as 'none'"
        )

    def outer(self, module: nn.Module) -> _Replacement:
        return _Replacement(module, self.segment(module.forward, module))

    def inner(self, module: nn.Module) -> _Replacement:
        return _Replacement(module, Segment(module.forward, module))

    def segment(self, function: Callable[..., Any], part: nn.Module) -> Segment:
        return Segment(function, part, self.keeping)

    def resnets(self, block: Any) -> Iterator[_Replacement]:
        if not _takes_skip_connections(block):
            yield from map(self.outer, block.resnets)
            return
        segments = [self.segment(partial(_resnet_with_skip, resnet), resnet) for resnet in block.resnets]
        yield _Replacement(block, partial(_up_block_forward, block, segments))

    def transformers(self, block: Any) -> Iterator[_Replacement]:
        for transformer in getattr(block, "attentions", ()):
            if self.placement == "nested":
                yield self.outer(transformer)
                yield from map(self.inner, _parts(transformer))
            elif len(transformer.transformer_blocks) == 1:
                yield self.outer(transformer)
            else:
                yield _Replacement(transformer, self.transformer_of_many_blocks(transformer))

    def transformer_of_many_blocks(self, transformer: Any) -> Callable[..., Any]:
        first, *middle, last = transformer.transformer_blocks
        segments = [
            self.segment(partial(_first_transformer_block, transformer), first),
            *(self.segment(transformer_block, transformer_block) for transformer_block in middle),
        ]
        ending = self.segment(partial(_last_transformer_block, transformer), last)
        return partial(_transformer_forward, segments, ending)

    def samplers(self, block: Any) -> Iterator[_Replacement]:
        for name in ("downsamplers", "upsamplers"):
            yield from map(self.outer, getattr(block, name, None) or ())


def _parts(transformer: Any) -> list[nn.Module]:
    blocks = list(transformer.transformer_blocks)
    if len(blocks) > 1:
        return blocks
    return [attention for attention in (blocks[0].attn1, blocks[0].attn2) if attention is not None]


def _resnet_with_skip(resnet: nn.Module, hidden_states: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
    return resnet(Concatenation.apply(hidden_states, skip), temb)


def _up_block_forward(
    block: Any,
    resnets: list[Segment],
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    upsample_size: Any = None,
    **conditioning: Any,
) -> Tensor:
    """Compute an up block of a UNet, with each concatenation inside the segment of its resnet."""
    skips = list(res_hidden_states_tuple)
    for resnet, transformer in zip_longest(resnets, getattr(block, "attentions", ())):
        hidden_states = resnet(hidden_states, skips.pop(), temb)
        if transformer is not None:
            hidden_states = transformer(hidden_states, **conditioning, return_dict=False)[0]
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states, upsample_size)
    return hidden_states


def _transformer_forward(
    segments: list[Segment], ending: Segment, hidden_states: Tensor, *, return_dict: bool, **conditioning: Any
) -> tuple[Tensor]:
    """Compute a transformer of several blocks; the norm and the projections share the segments of the outer blocks."""
    given = {name: value for name, value in conditioning.items() if value is not None}
    tokens = hidden_states
    for segment in segments:
        tokens = segment(tokens, **given)
    return (ending(tokens, hidden_states, **given),)


def _first_transformer_block(transformer: Any, hidden_states: Tensor, **conditioning: Any) -> Tensor:
    tokens, _ = transformer._operate_on_continuous_inputs(hidden_states)
    return transformer.transformer_blocks[0](tokens, **conditioning)


def _last_transformer_block(transformer: Any, tokens: Tensor, residual: Tensor, **conditioning: Any) -> Tensor:
    tokens = transformer.transformer_blocks[-1](tokens, **conditioning)
    batch, _, height, width = residual.shape
    return transformer._get_output_for_continuous_inputs(
        tokens, residual=residual, batch_size=batch, height=height, width=width, inner_dim=tokens.shape[-1]
    )


def _is_unet_block(block: Any) -> bool:
    """Recognise a block that is made of resnets, transformers between them, and samplers."""
    names = {name for name, _ in block.named_children()}
    return (
        "resnets" in names <= {"resnets", "attentions", "downsamplers", "upsamplers"}
        and all(map(_is_resnet, block.resnets))
        and all(map(_is_transformer, getattr(block, "attentions", ())))
    )


def _takes_skip_connections(block: Any) -> bool:
    return hasattr(block, "upsamplers")


def _is_resnet(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("norm1", "conv1", "norm2", "conv2", "time_emb_proj"))


def _is_transformer(module: Any) -> bool:
    return (
        getattr(module, "is_input_continuous", False)
        and len(module.transformer_blocks) > 0
        and all(map(_is_transformer_block, module.transformer_blocks))
    )


def _is_transformer_block(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("norm1", "attn1", "attn2", "ff"))


def _text_encoder_layers(module: Any) -> list[nn.Module] | None:
    """Return the layers of a text encoder: transformers 4 keeps the encoder one level deeper than transformers 5."""
    encoder = getattr(getattr(module, "text_model", module), "encoder", None)
    layers = getattr(encoder, "layers", None)
    return None if layers is None else list(layers)
