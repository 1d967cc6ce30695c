"""Attention implementations of a UNet.

torch's SDPA is diffusers' default; xformers' memory-efficient attention (arXiv:2112.05682) is optional. Both keep the
scores in fp32 whatever the type of their inputs, which is what ``upcast_attention`` in a UNet's configuration asks for
(Stable Diffusion 2.1); diffusers' processors ignore that field and rely on them.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

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

    Raises:
        DependencyError: As for :func:`check`.
    """
    check(attention, device)
    if attention == "sdpa":
        return lambda: None
    unet.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
    return unet.disable_xformers_memory_efficient_attention  # type: ignore[return-value]
