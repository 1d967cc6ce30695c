"""GroupNorm followed by SiLU, forward and backward; only the input, mean and inverse deviation are kept.

A sample is a matrix of channels and positions, stored row by row (NCHW) or column by column (channels_last), and the
result keeps that layout. With x^ = (x - mean) * rstd per group, z = weight x^ + bias and y = z sigmoid(z):

    dz = dy sigmoid(z) (1 + z (1 - sigmoid(z))),  dbias = sum dz,  dweight = sum dz x^,
    dx = rstd (weight dz - (sum weight dz + x^ sum weight dz x^) / n),  sums over the group's n elements.

Statistics are fp32: per channel and chunk of positions a sum and the squared distances from its mean, merged without
cancellation (Chan et al. 1983). Each sum has a fixed order and nothing is added atomically: equal inputs, equal bits.

Reference: Wu and He 2018, arXiv:1803.08494.
"""

from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .dispatch import register, uses_kernel
from .group_norm_silu_eager import group_norm_silu_backward_eager, group_norm_silu_eager
from .group_norm_silu_triton import group_norm_silu_backward_triton, group_norm_silu_triton
from .layout import dense
from .operators import runs_plainly


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize groups of channels and apply SiLU.

    Args:
        x: `(N, C, ...)`.
        num_groups: A divisor of C.
        weight: `(C,)`, any floating type.
        bias: `(C,)`.
        eps: Added to the variance.

    Returns:
        A tensor of the type, shape and layout of x.

    Raises:
        ValueError: The groups do not divide the channels, or the parameters do not fit.
    """
    if x.shape[1] % num_groups:
        raise ValueError(f"{x.shape[1]} channels cannot be divided into {num_groups} groups")
    if weight.shape != (x.shape[1],) or bias.shape != (x.shape[1],):
        raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit {x.shape[1]} channels")
    if runs_plainly(x):
        return _GroupNormSiLU.apply(x, num_groups, weight, bias, eps)
    return _forward_op(x, num_groups, weight, bias, eps)[0]


def _serve(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    serve = group_norm_silu_triton if uses_kernel("group_norm_silu", x) else group_norm_silu_eager
    return serve(x, num_groups, weight, bias, eps)


def _serve_backward(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    serve = group_norm_silu_backward_triton if uses_kernel("group_norm_silu", x) else group_norm_silu_backward_eager
    return serve(grad_output, x, mean, rstd, weight, bias)


_forward_op = torch.library.custom_op(add_op_namespace_prefix("group_norm_silu"), _serve, mutates_args=())
_backward_op = torch.library.custom_op(
    add_op_namespace_prefix("group_norm_silu_backward"), _serve_backward, mutates_args=()
)


@_forward_op.register_fake
def _(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return torch.empty_like(dense(x)), statistics, torch.empty_like(statistics)


@_backward_op.register_fake
def _(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(x)), torch.empty_like(weight), torch.empty_like(bias)


def _save_input(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias)


def _backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple:
    run = _serve_backward if runs_plainly(grad_output) else _backward_op
    grad_x, grad_weight, grad_bias = run(grad_output, *ctx.saved_tensors)
    return grad_x, None, grad_weight, grad_bias, None


_forward_op.register_autograd(_backward, setup_context=_save_input)


class _GroupNormSiLU(torch.autograd.Function):
    """Bypasses torch's wrapper of the operator; computes the same bits and keeps the same tensors."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _serve(*inputs)
        _save_input(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        return _backward(ctx, *grad_outputs)


def _self_test(device: torch.device) -> None:
    x = torch.linspace(-3, 4, 2 * 12 * 77, device=device).sin().reshape(2, 12, 7, 11)
    grad_output = torch.linspace(1, -2, 2 * 12 * 77, device=device).reshape(2, 12, 7, 11)
    weight, bias = torch.linspace(0.5, 2, 12, device=device), torch.linspace(-1, 1, 12, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        results = []
        for forward, backward in (
            (group_norm_silu_triton, group_norm_silu_backward_triton),
            (group_norm_silu_eager, group_norm_silu_backward_eager),
        ):
            output = forward(x, 4, weight, bias, 1e-5)
            results.append((*output, *backward(grad_output, x, *output[1:], weight, bias)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


register("group_norm_silu", _self_test)
