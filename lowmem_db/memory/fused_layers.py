"""Fused GroupNorm+SiLU and GEGLU inside a UNet: fewer tensors kept for backward, the same state dict.

For a norm with its activation, and for a gate, only the input is kept; PyTorch keeps the tensors in between too. Layers
are recognised by their parts, so this works for any UNet built from diffusers' blocks and imports no library.

What it changes, and what it does not:

* It replaces forward functions and the activations of blocks, not parameters or their names: checkpoints, adapters,
  24-bit weights and optimizers that step in the backward pass see the same model.
* It works with any placement of :mod:`lowmem_db.memory.checkpointing`, applied and undone before or after, and on any
  device, including meta: a trace sees the operators ``lowmem_db_kernels::group_norm_silu`` and ``geglu``.
* The norm's arithmetic is fp32 and its result is rounded once, to the type of the input; PyTorch also rounds between
  norm and activation. Under autocast PyTorch passes fp32 on, which the next convolution rounds to the same type.
  Losses and gradients differ in the last bits and are as close to float64 as PyTorch's: tests hold them to 1.5 times
  its error. Recomputing gives the same bits again.
* A block with another activation, or with scale and shift between norm and activation, is left alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lowmem_db_kernels import geglu, group_norm_silu
from torch import Tensor, nn

from lowmem_db import environment
from lowmem_db.errors import DependencyError

_OPERATORS = ("group_norm_silu", "geglu")


class _ActivatedInNorm(nn.Module):
    """Replaces a block's SiLU: feature maps were already activated in the norm, the time embedding was not."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 else nn.functional.silu(x)


def check(device: torch.device) -> None:
    """Refuse fused layers on a CUDA device without compiled kernels; on the CPU the eager twins save memory too.

    Raises:
        DependencyError: Eager twins would run on the GPU, which need more memory than separate layers.
    """
    if (reason := why_not(device)) is not None and device.type == "cuda":
        raise DependencyError(
            f"memory.fused_layers: true needs compiled kernels on {device}: {reason} (`lowmem-db doctor`); leave it out"
        )


def why_not(device: torch.device) -> str | None:
    """Return why compiled kernels cannot be used on a device, or None if they can."""
    return environment.why_not_compiled(_OPERATORS, device)


def apply(unet: nn.Module) -> Callable[[], None]:
    """Make the norms of residual blocks, the output norm and the GEGLU layers use the fused kernels.

    Args:
        unet: A UNet of diffusers' blocks; changed in place, its state dict is not.

    Returns:
        A function that restores the layers.

    Raises:
        ValueError: The model has no layer that can be fused, or its layers are already fused.
    """
    replacements = list(_replacements(unet))
    if not replacements:
        raise ValueError(f"{type(unet).__name__} has no layer that can be fused, or its layers are already fused")
    before = [(owner, name, owner.__dict__.get(name, owner._modules.get(name))) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    return partial(_restore, before)


def _restore(before: list[tuple[nn.Module, str, Any]]) -> None:
    for owner, name, value in before:
        if value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def _replacements(unet: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield what to set: owner, attribute, value. A `forward` set on a layer shadows its class's."""
    module: Any
    for module in unet.modules():
        if _is_residual_block(module):
            yield module.norm1, "forward", partial(_norm_forward, module.norm1)
            yield module.norm2, "forward", partial(_norm_forward, module.norm2)
            yield module, "nonlinearity", _ActivatedInNorm()
        elif _is_geglu(module):
            yield module, "forward", partial(_geglu_forward, module)
    if _is_plain_norm(getattr(unet, "conv_norm_out", None)) and _is_silu(getattr(unet, "conv_act", None)):
        yield unet.conv_norm_out, "forward", partial(_norm_forward, unet.conv_norm_out)
        yield unet, "conv_act", _ActivatedInNorm()


def _is_residual_block(module: nn.Module) -> bool:
    """Return whether a block applies each norm and SiLU in sequence, without scale and shift in between."""
    return (
        all(_is_plain_norm(getattr(module, name, None)) for name in ("norm1", "norm2"))
        and _is_silu(getattr(module, "nonlinearity", None))
        and getattr(module, "time_embedding_norm", "default") == "default"
    )


def _is_geglu(module: nn.Module) -> bool:
    is_class = type(module).__name__ == "GEGLU" and "forward" not in module.__dict__
    return is_class and isinstance(getattr(module, "proj", None), nn.Module)


def _is_plain_norm(module: nn.Module | None) -> bool:
    return isinstance(module, nn.GroupNorm) and module.affine and "forward" not in module.__dict__


def _is_silu(module: nn.Module | None) -> bool:
    return isinstance(module, nn.SiLU)


def _norm_forward(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _geglu_forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return geglu(layer.proj(hidden_states))
