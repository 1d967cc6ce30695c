"""Fused GroupNorm+SiLU and GEGLU inside a UNet: fewer tensors kept for backward, the same state dict.

Of a norm with its activation, and of a gate, the input alone is kept, where PyTorch keeps what lies between too. Layers
are recognised by what they have, so any UNet built from diffusers' blocks is served and no library is imported.

What it needs and leaves as it is:

* Forward functions and the activations of blocks are replaced, parameters and their names are not: checkpoints,
  adapters, 24-bit weights and optimizers that step in the backward pass see the same model.
* Any placement of :mod:`lowmem_db.memory.checkpointing`, applied and undone before or after, and any device, meta too:
  a trace sees the operators ``lowmem_db_kernels::group_norm_silu`` and ``geglu``.
* The norm's arithmetic is fp32 and its result is rounded once, to the type of the input, where PyTorch rounds between
  norm and activation too; under autocast PyTorch hands fp32 on, which the next convolution rounds to the same type.
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
    """Stands where a block applies SiLU: feature maps were activated in the norm, the time embedding was not."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 else nn.functional.silu(x)


def check(device: torch.device) -> None:
    """Refuse fused layers on a CUDA device where their kernels do not serve; on the CPU eager twins save memory too.

    Raises:
        DependencyError: Eager twins would serve there, which need more memory than separate layers.
    """
    if (reason := why_not(device)) is not None and device.type == "cuda":
        raise DependencyError(
            f"memory.fused_layers: true needs compiled kernels on {device}: {reason} (`lowmem-db doctor`); leave it out"
        )


def why_not(device: torch.device) -> str | None:
    """Say why compiled kernels do not serve on a device; None where they do."""
    return environment.why_not_compiled(_OPERATORS, device)


def apply(unet: nn.Module) -> Callable[[], None]:
    """Let the norms of residual blocks, the output norm and the GEGLU layers use the fused kernels.

    Args:
        unet: A UNet of diffusers' blocks; changed in place, its state dict stays.

    Returns:
        A function that restores the layers as they were.

    Raises:
        ValueError: The model has no layer that can be fused, or is fused already.
    """
    replacements = list(_replacements(unet))
    if not replacements:
        raise ValueError(f"{type(unet).__name__} has no layer that can be fused, or its layers are fused already")
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
    """Yield what to set: owner, attribute, value. A `forward` set on a layer shadows that of its class."""
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
    """A block that applies each norm and SiLU one after the other: without scale and shift between them."""
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
