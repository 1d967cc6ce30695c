"""Attention implementations of a UNet.

SDPA of torch is what diffusers uses by itself; xformers' memory-efficient attention (arXiv:2112.05682) is for those who
ask for it. Both hold the scores in fp32 whatever type they are called in, which is what ``upcast_attention`` in the
configuration of a UNet asks for (Stable Diffusion 2.1): diffusers' processors leave that field to them.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from lowmem_db import environment
from lowmem_db.errors import DependencyError


def check(attention: Literal["sdpa", "xformers"], device: torch.device) -> None:
    """Refuse an implementation that cannot serve, before anything is loaded.

    Raises:
        DependencyError: xformers is asked for, and is missing or has no operator for the device.
    """
    if attention == "sdpa":
        return
    environment.require("xformers")
    if device.type != "cuda":
        raise DependencyError(
            f"memory.attention: 'xformers' has no operator for the device {device.type!r}; use memory.attention=sdpa"
        )


def apply(unet: nn.Module, attention: Literal["sdpa", "xformers"], device: torch.device) -> Callable[[], None]:
    """Give a UNet an attention implementation; return what takes it back.

    Raises:
        DependencyError: As :func:`check`.
    """
    check(attention, device)
    if attention == "sdpa":
        return lambda: None
    unet.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
    return unet.disable_xformers_memory_efficient_attention  # type: ignore[return-value]
