"""Blocks of diffusers' UNets and of transformers' text encoders.

``layers`` recomputes each resnet and each transformer block, as diffusers does; ``segments`` moves the concatenation
with a skip connection into the segment of its resnet, and the norms and projections of a transformer into those of its
first and last block; ``nested`` recomputes the parts of a recomputed transformer once more.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.models.families.blocks import Block, LayerBlock, MakeSegment, Recomputing, Replacement


def find_blocks(modules: Mapping[str, nn.Module]) -> dict[str, Block]:
    """Return the blocks of diffusers' UNets and of transformers' text encoders, by name.

    Args:
        modules: UNets and text encoders, by component.

    Returns:
        ``unet.down_blocks.0``, ..., ``unet.mid_block``, ``unet.up_blocks.0``, ..., ``text_encoder``.
    """
    blocks: dict[str, Block] = {}
    for component, module in modules.items():
        if hasattr(module, "down_blocks"):
            blocks |= {f"{component}.{path}": UnetBlock(block) for path, block in _blocks_of_unet(module)}
        elif (layers := _text_encoder_layers(module)) is not None:
            blocks[component] = LayerBlock(module, layers)
        else:
            blocks[component] = UnetBlock(module)  # which supports no placement for it
    return blocks


@dataclass(frozen=True)
class UnetBlock:
    """A block of a UNet: resnets, transformers between them, and samplers."""

    module: nn.Module

    def replacements(self, placement: str, segment: MakeSegment) -> list[Replacement] | None:
        """Return the replacements, or None if the block is not made of such parts."""
        block: Any = self.module
        if placement == "layers":
            layers = [part for part in block.modules() if _is_resnet(part) or _is_transformer_block(part)]
            return LayerBlock(block, layers).replacements(placement, segment) if layers else None
        if not _is_unet_block(block):
            return None
        return [*_resnets(block, segment), *_transformers(block, placement, segment), *_samplers(block, segment)]


class Concatenation(torch.autograd.Function):
    """Concatenate feature maps along channels.

    Its gradients are copies. Those of :func:`torch.cat` are views that keep the whole gradient alive, and a skip
    connection's gradient is needed long after the other one.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, skip: Tensor) -> Tensor:
        """Return ``torch.cat([hidden_states, skip], dim=1)``."""
        ctx.num_channels = (hidden_states.shape[1], skip.shape[1])
        return torch.cat([hidden_states, skip], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of both parts."""
        return tuple(part.clone() for part in gradients[0].split(ctx.num_channels, dim=1))


def _blocks_of_unet(unet: Any) -> Iterator[tuple[str, nn.Module]]:
    for index, block in enumerate(unet.down_blocks):
        yield f"down_blocks.{index}", block
    if unet.mid_block is not None:
        yield "mid_block", unet.mid_block
    for index, block in enumerate(unet.up_blocks):
        yield f"up_blocks.{index}", block


def _outer(module: nn.Module, segment: MakeSegment) -> Replacement:
    return Replacement(module, segment(module.forward, module))


def _inner(module: nn.Module, segment: MakeSegment) -> Replacement:
    return Replacement(module, segment(module.forward, module, is_outer=False))


def _resnets(block: Any, segment: MakeSegment) -> Iterator[Replacement]:
    if not _takes_skip_connections(block):
        yield from (_outer(resnet, segment) for resnet in block.resnets)
        return
    segments = [segment(partial(_resnet_with_skip, resnet), resnet) for resnet in block.resnets]
    yield Replacement(block, Recomputing(_up_block_forward, block, segments))


def _transformers(block: Any, placement: str, segment: MakeSegment) -> Iterator[Replacement]:
    for transformer in getattr(block, "attentions", ()):
        if _is_attention(transformer):
            yield _outer(transformer, segment)
        elif placement == "nested":
            yield _outer(transformer, segment)
            yield from (_inner(part, segment) for part in _parts(transformer))
        elif len(transformer.transformer_blocks) == 1:
            yield _outer(transformer, segment)
        else:
            yield Replacement(transformer, _transformer_of_many_blocks(transformer, segment))


def _transformer_of_many_blocks(transformer: Any, segment: MakeSegment) -> Callable[..., Any]:
    first, *middle, last = transformer.transformer_blocks
    entrance = nn.ModuleList([transformer.norm, transformer.proj_in, first])
    segments = [
        segment(partial(_first_transformer_block, transformer), entrance),
        *(segment(transformer_block, transformer_block) for transformer_block in middle),
    ]
    ending = segment(partial(_last_transformer_block, transformer), nn.ModuleList([last, transformer.proj_out]))
    return Recomputing(_transformer_forward, segments, ending)


def _samplers(block: Any, segment: MakeSegment) -> Iterator[Replacement]:
    for name in ("downsamplers", "upsamplers"):
        yield from (_outer(sampler, segment) for sampler in getattr(block, name, None) or ())


def _parts(transformer: Any) -> list[nn.Module]:
    blocks = list(transformer.transformer_blocks)
    if len(blocks) > 1:
        return blocks
    return [attention for attention in (blocks[0].attn1, blocks[0].attn2) if attention is not None]


def _resnet_with_skip(resnet: nn.Module, hidden_states: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
    return resnet(Concatenation.apply(hidden_states, skip), temb)


def _up_block_forward(
    block: Any,
    resnets: list[Callable[..., Any]],
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    upsample_size: Any = None,
    **conditioning: Any,
) -> Tensor:
    """Compute an up block of a UNet, with each concatenation inside the segment of its resnet."""
    skips = list(res_hidden_states_tuple)
    for resnet, attention in zip_longest(resnets, getattr(block, "attentions", ())):
        hidden_states = resnet(hidden_states, skips.pop(), temb)
        if attention is not None:
            hidden_states = _attend(attention, hidden_states, conditioning)
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states, temb if _is_resnet(upsampler) else upsample_size)
    return hidden_states


def _attend(attention: Any, hidden_states: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
    """Call a transformer, or an attention by itself, as its block does."""
    if not _is_attention(attention):
        return attention(hidden_states, **conditioning, return_dict=False)[0]
    embeds, mask = conditioning.get("encoder_hidden_states"), conditioning.get("attention_mask")
    if mask is None and embeds is not None:
        mask = conditioning.get("encoder_attention_mask")
    return attention(hidden_states, encoder_hidden_states=embeds, attention_mask=mask)


def _transformer_forward(
    segments: list[Callable[..., Any]],
    ending: Callable[..., Any],
    hidden_states: Tensor,
    *,
    return_dict: bool,
    **conditioning: Any,
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
    """Return whether a block is made of resnets, transformers between them, and samplers."""
    names = {name for name, _ in block.named_children()}
    return (
        "resnets" in names <= {"resnets", "attentions", "downsamplers", "upsamplers"}
        and all(map(_is_resnet, block.resnets))
        and all(_is_transformer(part) or _is_attention(part) for part in getattr(block, "attentions", ()))
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


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module is an attention with keys and values of its own for the prompt."""
    return all(getattr(module, name, None) is not None for name in ("group_norm", "add_k_proj", "add_v_proj"))


def _is_transformer_block(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("norm1", "attn1", "attn2", "ff"))


def _text_encoder_layers(module: Any) -> list[nn.Module] | None:
    """Return the layers of a text encoder: transformers 4 keeps the encoder one level deeper than transformers 5."""
    encoder = getattr(getattr(module, "text_model", module), "encoder", None)
    layers = getattr(encoder, "layers", None)
    return None if layers is None else list(layers)
