"""`group_norm_silu` in plain PyTorch: the reference for its kernels, and the fallback without them."""

import torch
from torch import Tensor

from .layout import dense, like


def _per_channel(x: Tensor, values: Tensor) -> Tensor:
    """Reshape `(N, G)` or `(C,)` values so that they broadcast against x."""
    if values.ndim == 2:
        values = values.repeat_interleave(x.shape[1] // values.shape[1], dim=1)
    return values.to(torch.float32).reshape(-1, x.shape[1], *[1] * (x.ndim - 2))


def group_norm_silu_eager(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `group_norm_silu_triton` in plain PyTorch."""
    x = dense(x)
    parameters = (weight.to(torch.float32), bias.to(torch.float32))
    sizes = (x.shape[0], x.shape[1], x.shape[2:].numel(), num_groups)
    # For channels_last the CPU routine computes the variance as a difference of squares.
    wide = x.to(torch.float32).contiguous()
    z, mean, rstd = torch.native_group_norm(wide, *parameters, *sizes, eps)
    return like(torch.nn.functional.silu(z).to(x.dtype), x), mean, rstd


def group_norm_silu_backward_eager(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `group_norm_silu_backward_triton` in plain PyTorch."""
    x = dense(x)
    wide = x.to(torch.float32).contiguous()
    normalized = (wide - _per_channel(x, mean)) * _per_channel(x, rstd)
    z = normalized * _per_channel(x, weight) + _per_channel(x, bias)
    grad_z = torch.ops.aten.silu_backward(grad_output.to(torch.float32).contiguous(), z)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad_z, wide, mean, rstd, weight.to(torch.float32), x.shape[0], x.shape[1], x.shape[2:].numel(), mean.shape[1],
        [True, True, True],
    )  # fmt: skip
    return like(grad_x.to(x.dtype), x), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
