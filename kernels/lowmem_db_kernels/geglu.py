# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""GEGLU with the exact error function, as in diffusers; only the packed input is kept for backward.

With the packed input split into hidden and gate along its last dimension, the output is hidden * gelu(gate) and
gelu(x) = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2.

References: Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from ._triton import cdiv, jit, load_fp32, next_power_of_2, program_index, store_rounded, tl
from .dispatch import register, uses_kernel
from .launch import LaunchConfig, device_of, launch_config
from .operators import runs_plainly

_MAX_COLUMNS = 256
INV_SQRT_2 = tl.constexpr(1.0 / math.sqrt(2.0))
INV_SQRT_2_PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


def geglu(packed: Tensor) -> Tensor:
    """Gate the first half of the last dimension by the GELU of the second half.

    Args:
        packed: `(..., 2 N)`.

    Returns:
        `(..., N)`, of the same type, contiguous.

    Raises:
        ValueError: The last dimension is odd.
    """
    if packed.shape[-1] % 2:
        raise ValueError(f"the last dimension of {tuple(packed.shape)} cannot be halved")
    return _GEGLU.apply(packed) if runs_plainly(packed) else _geglu_op(packed)


def _serve(packed: Tensor) -> Tensor:
    return geglu_triton(packed) if uses_kernel("geglu", packed) else geglu_eager(packed)


def _serve_backward(grad_output: Tensor, packed: Tensor) -> Tensor:
    serve = geglu_backward_triton if uses_kernel("geglu", packed) else geglu_backward_eager
    return serve(grad_output, packed)


_geglu_op = torch.library.custom_op(add_op_namespace_prefix("geglu"), _serve, mutates_args=())
_geglu_backward_op = torch.library.custom_op(
    add_op_namespace_prefix("geglu_backward"), _serve_backward, mutates_args=()
)


@_geglu_op.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


@_geglu_backward_op.register_fake
def _(grad_output: Tensor, packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape)


def _save_packed(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad_output: Tensor) -> Tensor:
    run = _serve_backward if runs_plainly(grad_output) else _geglu_backward_op
    return run(grad_output, ctx.saved_tensors[0])


_geglu_op.register_autograd(_backward, setup_context=_save_packed)


class _GEGLU(torch.autograd.Function):
    """Bypasses torch's wrapper of the operator; computes the same bits and keeps the same tensors."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return _serve(packed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return _backward(ctx, *grad_outputs)


# --- plain PyTorch ---


def geglu_eager(packed: Tensor) -> Tensor:
    """Twin of `geglu_triton` in plain PyTorch."""
    hidden, gate = packed.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate)


def geglu_backward_eager(grad_output: Tensor, packed: Tensor) -> Tensor:
    """Twin of `geglu_backward_triton` in plain PyTorch."""
    hidden, gate = packed.chunk(2, dim=-1)
    grad_hidden = grad_output * torch.nn.functional.gelu(gate)
    grad_gate = torch.ops.aten.gelu_backward(grad_output * hidden, gate)
    return torch.cat([grad_hidden, grad_gate], dim=-1)


# --- Triton ---


@jit
def _tile(num_rows, num_columns, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the offsets of a tile in the output and in the packed input, and its mask; grid `(tiles,)`."""
    tiles_per_row = tl.cdiv(num_columns, COLUMNS)
    tile = program_index(REVERSE)
    rows = (tile // tiles_per_row * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tile % tiles_per_row * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    offsets = rows.to(tl.int64) * num_columns + columns
    return offsets, rows.to(tl.int64) * (2 * num_columns) + columns, inside


@jit
def _geglu_kernel(
    packed_ptr, output_ptr, num_rows, num_columns, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    offsets, packed_offsets, inside = _tile(num_rows, num_columns, REVERSE, ROWS, COLUMNS)
    hidden = load_fp32(packed_ptr + packed_offsets, inside)
    gate = load_fp32(packed_ptr + num_columns + packed_offsets, inside)
    cumulative = 0.5 * (1.0 + tl.math.erf(gate * INV_SQRT_2))
    store_rounded(output_ptr + offsets, hidden * (gate * cumulative), inside)


@jit
def _geglu_backward_kernel(
    grad_output_ptr,
    packed_ptr,
    grad_packed_ptr,
    num_rows,
    num_columns,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    offsets, packed_offsets, inside = _tile(num_rows, num_columns, REVERSE, ROWS, COLUMNS)
    grad_output = load_fp32(grad_output_ptr + offsets, inside)
    hidden = load_fp32(packed_ptr + packed_offsets, inside)
    gate = load_fp32(packed_ptr + num_columns + packed_offsets, inside)
    cumulative = 0.5 * (1.0 + tl.math.erf(gate * INV_SQRT_2))
    density = INV_SQRT_2_PI * tl.exp(-0.5 * gate * gate)
    store_rounded(grad_packed_ptr + packed_offsets, grad_output * (gate * cumulative), inside)
    grad_gate = grad_output * hidden * (cumulative + gate * density)
    store_rounded(grad_packed_ptr + num_columns + packed_offsets, grad_gate, inside)


def _grid_and_tile(config: LaunchConfig, num_rows: int, num_columns: int) -> tuple[tuple[int], dict[str, Any]]:
    columns = min(_MAX_COLUMNS, config.block, next_power_of_2(num_columns))
    rows = config.block // columns
    tiles = cdiv(num_rows, rows) * cdiv(num_columns, columns)
    return (tiles,), {"REVERSE": config.reverse, "ROWS": rows, "COLUMNS": columns, **config.options}


def geglu_triton(packed: Tensor) -> Tensor:
    """Launch the forward kernel.

    Args:
        packed: As in `geglu`.

    Returns:
        As `geglu`.
    """
    packed = packed.contiguous()
    num_columns = packed.shape[-1] // 2
    output = packed.new_empty((*packed.shape[:-1], num_columns))
    if output.numel():
        num_rows = output.numel() // num_columns
        grid, tile = _grid_and_tile(launch_config("geglu", packed), num_rows, num_columns)
        with device_of(packed):
            _geglu_kernel[grid](packed, output, num_rows, num_columns, **tile)
    return output


def geglu_backward_triton(grad_output: Tensor, packed: Tensor) -> Tensor:
    """Launch the backward kernel.

    Args:
        grad_output: `(..., N)`.
        packed: The input of the forward.

    Returns:
        The gradient of the packed input, contiguous.
    """
    packed, grad_output = packed.contiguous(), grad_output.contiguous()
    grad_packed = torch.empty_like(packed)
    if grad_output.numel():
        num_columns = grad_output.shape[-1]
        num_rows = grad_output.numel() // num_columns
        grid, tile = _grid_and_tile(launch_config("geglu", packed), num_rows, num_columns)
        with device_of(packed):
            _geglu_backward_kernel[grid](grad_output, packed, grad_packed, num_rows, num_columns, **tile)
    return grad_packed


def _self_test(device: torch.device) -> None:
    packed = torch.linspace(-6, 6, 5 * 2 * 300, device=device).reshape(5, 600)
    grad_output = torch.linspace(1, -2, 5 * 300, device=device).reshape(5, 300)
    torch.testing.assert_close(geglu_triton(packed), geglu_eager(packed), rtol=1e-5, atol=1e-5)
    got, expected = geglu_backward_triton(grad_output, packed), geglu_backward_eager(grad_output, packed)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


register("geglu", _self_test)
