"""Launches the kernels of `group_norm_silu`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import group_norm_silu_kernels as kernels
from ._triton import cdiv, next_power_of_2
from .launch import LaunchConfig, device_of, launch_config
from .layout import dense, is_channels_last, like

_SPATIAL_TILE = 256
_CHANNELS_LAST_TILE = 8
_TILES_PER_CHUNK = 8


class _Plan(NamedTuple):
    """Sizes of one call, with which the kernels are launched."""

    num_samples: int
    num_channels: int
    spatial_size: int
    num_chunks: int
    chunk: int
    rest_of_grid: tuple[int, int]
    tile: dict[str, Any]


def _plan(config: LaunchConfig, x: Tensor, *, half_tiles: bool = False) -> _Plan:
    """Split positions into tiles and fixed chunks of tiles, on which sums depend, and channels to fill a tile.

    For channels_last a tile is wide in channels, so a chunk has several tiles to limit the number of partial sums.
    `half_tiles` makes tiles half as wide there.
    """
    num_samples, num_channels = x.shape[:2]
    spatial_size = x[0, 0].numel()
    channels_last = is_channels_last(x)
    positions = min(_CHANNELS_LAST_TILE if channels_last else _SPATIAL_TILE, next_power_of_2(spatial_size))
    num_tiles = min(_TILES_PER_CHUNK, next_power_of_2(cdiv(spatial_size, positions))) if channels_last else 1
    channels = min(max(config.block // positions, 1), next_power_of_2(num_channels))
    if half_tiles and channels_last and channels * positions == config.block:
        channels //= 2
    tile = {"CHANNELS_LAST": channels_last, "REVERSE": config.reverse, "CHANNELS": channels, "POSITIONS": positions}
    chunk = positions * num_tiles
    rest_of_grid = (cdiv(num_channels, channels), num_samples)
    num_chunks = cdiv(spatial_size, chunk)
    return _Plan(num_samples, num_channels, spatial_size, num_chunks, chunk, rest_of_grid, {**tile, **config.options})


def group_norm_silu_triton(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the three forward kernels.

    Args:
        x: As in `group_norm_silu`.
        num_groups: As in `group_norm_silu`.
        weight: As in `group_norm_silu`.
        bias: As in `group_norm_silu`.
        eps: As in `group_norm_silu`.

    Returns:
        The output, and fp32 mean and inverse deviation `(N, G)`.
    """
    x = dense(x)
    output = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return output, mean, rstd
    config = launch_config("group_norm_silu", x)
    plan = _plan(config, x)
    partial = x.new_empty((2, plan.num_samples, plan.num_channels, plan.num_chunks), dtype=torch.float32)
    channels_per_group = plan.num_channels // num_groups
    num_partials, group_size = channels_per_group * plan.num_chunks, channels_per_group * plan.spatial_size
    num_tiles = cdiv(plan.spatial_size, plan.tile["POSITIONS"])
    with device_of(x):
        kernels._statistics_kernel[(config.grid(plan.num_chunks), *plan.rest_of_grid)](
            x, partial[0], partial[1], plan.num_channels, plan.spatial_size, plan.num_chunks,
            TILES=plan.chunk // plan.tile["POSITIONS"], **plan.tile,
        )  # fmt: skip
        kernels._merge_statistics_kernel[(plan.num_samples * num_groups,)](
            partial[0], partial[1], mean, rstd, plan.spatial_size, plan.num_chunks, num_partials,
            float(group_size), eps, CHUNK=plan.chunk, BLOCK=min(1024, next_power_of_2(num_partials)), **config.options,
        )  # fmt: skip
        kernels._apply_kernel[(num_tiles, *plan.rest_of_grid)](
            x, mean, rstd, weight, bias, output, plan.num_channels, num_groups, plan.spatial_size, **plan.tile
        )
    return output, mean, rstd


def group_norm_silu_backward_triton(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the three backward kernels.

    Args:
        grad_output: Gradient of the output.
        x: The input of the forward.
        mean: From the forward.
        rstd: From the forward.
        weight: As in `group_norm_silu`.
        bias: As in `group_norm_silu`.

    Returns:
        Gradients of x, weight and bias, in their types.
    """
    x = dense(x)
    grad_output = like(grad_output, x)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    config = launch_config("group_norm_silu", x)
    plan = _plan(config, x)
    # The sums keep five values per channel in registers; half a tile leaves room for as many programs as usual.
    sums_plan = _plan(config, x, half_tiles=True)
    num_groups = mean.shape[1]
    partial = x.new_empty((2, plan.num_samples, plan.num_channels, plan.num_chunks), dtype=torch.float32)
    groups = mean.new_empty((2, *mean.shape))
    channels = next_power_of_2(plan.num_channels // num_groups)
    num_tiles = cdiv(plan.spatial_size, plan.tile["POSITIONS"])
    with device_of(x):
        kernels._sums_kernel[(config.grid(plan.num_chunks), *sums_plan.rest_of_grid)](
            grad_output, x, mean, rstd, weight, bias, partial[0], partial[1], plan.num_channels, num_groups,
            plan.spatial_size, plan.num_chunks, TILES=plan.chunk // plan.tile["POSITIONS"], **sums_plan.tile,
        )  # fmt: skip
        kernels._merge_sums_kernel[(num_groups,)](
            partial[0], partial[1], weight, grad_weight, grad_bias, groups[0], groups[1], plan.num_samples,
            plan.num_channels, num_groups, plan.num_chunks, CHANNELS=channels,
            CHUNKS=min(max(1024 // channels, 1), next_power_of_2(plan.num_chunks)), **config.options,
        )  # fmt: skip
        kernels._grad_input_kernel[(num_tiles, *plan.rest_of_grid)](
            grad_output, x, mean, rstd, weight, bias, groups[0], groups[1], grad_x, plan.num_channels, num_groups,
            plan.spatial_size, **plan.tile,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias
