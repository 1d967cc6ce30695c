"""Attention implementations of a UNet.

torch's SDPA is diffusers' default; xformers' memory-efficient attention (arXiv:2112.05682) is optional. Both keep the
scores in fp32 whatever the type of their inputs, which is what ``upcast_attention`` in a UNet's configuration asks for
(Stable Diffusion 2.1); diffusers' processors ignore that field and rely on them.

Once torch is strict, xformers too chooses an operator that computes the same bits each time: torch's memory-efficient
one, which is what a plan traces, with the copies that diffusers makes for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem_db import environment
from lowmem_db.errors import DependencyError


def check(attention: Literal["sdpa", "xformers"], device: torch.device) -> None:
    """Refuse an implementation that cannot be used, before anything is loaded.

    Raises:
        DependencyError: xformers is selected, but is missing or has no operator for the device.
    """
    if attention == "sdpa":
        return
    environment.require("xformers")
    if device.type != "cuda":
        raise DependencyError(
            f"memory.attention: 'xformers' has no operator for the device {device.type!r}; use memory.attention=sdpa"
        )


def apply(unet: nn.Module, attention: Literal["sdpa", "xformers"], device: torch.device) -> Callable[[], None]:
    """Set a UNet's attention implementation; return the function that undoes it.

    On the meta device xformers need not be there: its allocations are traced.

    Raises:
        DependencyError: As for :func:`check`.
    """
    if attention == "xformers" and device.type == "meta":
        traced: Any = unet
        undo = partial(traced.set_attn_processor, dict(traced.attn_processors))
        traced.set_attn_processor(_TracedXformers())
        return undo
    check(attention, device)
    if attention == "sdpa":
        return lambda: None
    unet.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
    return unet.disable_xformers_memory_efficient_attention  # type: ignore[return-value]


class _TracedXformers:
    """Allocates what diffusers' processor for xformers does, with SDPA in the place of its operator."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        if attn.add_k_proj is not None:
            return self._with_added_keys(attn, hidden_states, encoder_hidden_states)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (attn.head_to_batch_dim(each).contiguous().unsqueeze(1) for each in projected)
        del projected
        attended = functional.scaled_dot_product_attention(query, key, value, scale=attn.scale).squeeze(1)
        made: Tensor = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(attended)))
        return made / attn.rescale_output_factor

    def _with_added_keys(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
        """Do the same for attention with keys and values of its own for the prompt."""
        tokens = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross and encoder_hidden_states is not None:
            context = attn.norm_encoder_hidden_states(context)
        query = attn.head_to_batch_dim(attn.to_q(tokens))
        key, value = (attn.head_to_batch_dim(project(context)) for project in (attn.add_k_proj, attn.add_v_proj))
        if not attn.only_cross_attention:
            key = torch.cat([key, attn.head_to_batch_dim(attn.to_k(tokens))], dim=1)
            value = torch.cat([value, attn.head_to_batch_dim(attn.to_v(tokens))], dim=1)
        attended = functional.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1))
        made = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(attended.squeeze(1))))
        return made.transpose(-1, -2).reshape(hidden_states.shape) + hidden_states
