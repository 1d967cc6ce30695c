# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""GroupNorm followed by SiLU, forward and backward; only the input, mean and inverse deviation are kept.

A sample is a matrix of channels and positions, stored row by row (NCHW) or column by column (channels_last), and the
result keeps that layout. With x^ = (x - mean) * rstd per group, z = weight x^ + bias and y = z sigmoid(z):

    dz = dy sigmoid(z) (1 + z (1 - sigmoid(z))),  dbias = sum dz,  dweight = sum dz x^,
    dx = rstd (weight dz - (sum weight dz + x^ sum weight dz x^) / n),  sums over the group's n elements.

Statistics are fp32: per channel and chunk of positions a sum and the squared distances from its mean, merged without
cancellation (Chan et al. 1983). Each sum has a fixed order and nothing is added atomically: equal inputs, equal bits.

Reference: Wu and He 2018, arXiv:1803.08494.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from ._triton import cdiv, jit, load_fp32, next_power_of_2, store_rounded, tl
from .dispatch import register, uses_kernel
from .launch import LaunchConfig, device_of, launch_config

_SPATIAL_TILE = 256
_CHANNELS_LAST_TILE = 8
_TILES_PER_CHUNK = 8


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
        raise ValueError(f"{x.shape[1]} channels cannot be cut into {num_groups} groups")
    if weight.shape != (x.shape[1],) or bias.shape != (x.shape[1],):
        raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit {x.shape[1]} channels")
    return _forward_op(x, num_groups, weight, bias, eps)[0]


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where it is in neither of the two layouts."""
    return x if _is_channels_last(x) else x.contiguous()


@torch.library.custom_op(add_op_namespace_prefix("group_norm_silu"), mutates_args=())
def _forward_op(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    serve = group_norm_silu_triton if uses_kernel("group_norm_silu", x) else group_norm_silu_eager
    return serve(x, num_groups, weight, bias, eps)


@_forward_op.register_fake
def _(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return torch.empty_like(_dense(x)), statistics, torch.empty_like(statistics)


@torch.library.custom_op(add_op_namespace_prefix("group_norm_silu_backward"), mutates_args=())
def _backward_op(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    serve = group_norm_silu_backward_triton if uses_kernel("group_norm_silu", x) else group_norm_silu_backward_eager
    return serve(grad_output, x, mean, rstd, weight, bias)


@_backward_op.register_fake
def _(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(_dense(x)), torch.empty_like(weight), torch.empty_like(bias)


def _save_input(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias)


def _backward(ctx: Any, grad_output: Tensor, grad_mean: Tensor, grad_rstd: Tensor) -> tuple:
    grad_x, grad_weight, grad_bias = _backward_op(grad_output, *ctx.saved_tensors)
    return grad_x, None, grad_weight, grad_bias, None


_forward_op.register_autograd(_backward, setup_context=_save_input)

# --- plain PyTorch ---


def _per_channel(x: Tensor, values: Tensor) -> Tensor:
    """Shape `(N, G)` or `(C,)` values so that they multiply x."""
    if values.ndim == 2:
        values = values.repeat_interleave(x.shape[1] // values.shape[1], dim=1)
    return values.to(torch.float32).reshape(-1, x.shape[1], *[1] * (x.ndim - 2))


def group_norm_silu_eager(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `group_norm_silu_triton` in plain PyTorch."""
    x = _dense(x)
    parameters = (weight.to(torch.float32), bias.to(torch.float32))
    sizes = (x.shape[0], x.shape[1], x.shape[2:].numel(), num_groups)
    # In channels_last the CPU routine takes the variance as a difference of squares.
    wide = x.to(torch.float32).contiguous()
    z, mean, rstd = torch.native_group_norm(wide, *parameters, *sizes, eps)
    return _like(torch.nn.functional.silu(z).to(x.dtype), x), mean, rstd


def group_norm_silu_backward_eager(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `group_norm_silu_backward_triton` in plain PyTorch."""
    x = _dense(x)
    wide = x.to(torch.float32).contiguous()
    normalized = (wide - _per_channel(x, mean)) * _per_channel(x, rstd)
    z = normalized * _per_channel(x, weight) + _per_channel(x, bias)
    grad_z = torch.ops.aten.silu_backward(grad_output.to(torch.float32).contiguous(), z)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad_z, wide, mean, rstd, weight.to(torch.float32), x.shape[0], x.shape[1], x.shape[2:].numel(), mean.shape[1],
        [True, True, True],
    )  # fmt: skip
    return _like(grad_x.to(x.dtype), x), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _like(result: Tensor, x: Tensor) -> Tensor:
    """Lay a result out like x."""
    return result.contiguous(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)


# --- Triton ---


@jit
def _offsets(sample, channels, positions, num_channels, spatial_size, CHANNELS_LAST: tl.constexpr):
    """Return where a tile of channels (rows) and positions (columns) lies, contiguous along the stored order."""
    start = sample.to(tl.int64) * num_channels * spatial_size
    if CHANNELS_LAST:
        offsets = start + positions[None, :] * num_channels + channels[:, None]
    else:
        offsets = start + channels[:, None] * spatial_size + positions[None, :]
    return offsets


@jit
def _statistics_kernel(
    x_ptr,
    sum_ptr,
    distance_ptr,
    num_channels,
    spatial_size,
    num_chunks,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write the sum and the squared distance from the mean of each channel and chunk, `(N, C, chunks)`.

    Grid `(programs, tiles of channels, N)`; a program takes every so many chunks.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if REVERSE:
        program = num_programs - 1 - program
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(2)
    for chunk in range(program, num_chunks, num_programs):
        first = chunk * POSITIONS * TILES
        sums = tl.zeros((CHANNELS,), tl.float32)
        for tile in range(TILES):
            positions = first + tile * POSITIONS + tl.arange(0, POSITIONS)
            inside = (channels[:, None] < num_channels) & (positions[None, :] < spatial_size)
            offsets = _offsets(sample, channels, positions, num_channels, spatial_size, CHANNELS_LAST)
            sums += tl.sum(load_fp32(x_ptr + offsets, inside), axis=1)
        mean = sums / tl.minimum(spatial_size - first, POSITIONS * TILES).to(tl.float32)
        distances = tl.zeros((CHANNELS,), tl.float32)
        for tile in range(TILES):
            positions = first + tile * POSITIONS + tl.arange(0, POSITIONS)
            inside = (channels[:, None] < num_channels) & (positions[None, :] < spatial_size)
            offsets = _offsets(sample, channels, positions, num_channels, spatial_size, CHANNELS_LAST)
            distance = tl.where(inside, load_fp32(x_ptr + offsets, inside) - mean[:, None], 0.0)
            distances += tl.sum(distance * distance, axis=1)
        slots = (sample * num_channels + channels) * num_chunks + chunk
        tl.store(sum_ptr + slots, sums, mask=channels < num_channels)
        tl.store(distance_ptr + slots, distances, mask=channels < num_channels)


@jit
def _merge_statistics_kernel(
    partial_sum_ptr,
    partial_distance_ptr,
    mean_ptr,
    rstd_ptr,
    spatial_size,
    num_chunks,
    num_partials,
    group_size,
    eps,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the partial statistics of one group of one sample; grid `(N * G,)`."""
    group = tl.program_id(0)
    first = group.to(tl.int64) * num_partials
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_partials, BLOCK):
        index = start + tl.arange(0, BLOCK)
        sums += tl.load(partial_sum_ptr + first + index, mask=index < num_partials, other=0.0)
    mean = tl.sum(sums, axis=0) / group_size
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_partials, BLOCK):
        index = start + tl.arange(0, BLOCK)
        # The chunks of a channel are full but for the last one.
        count = tl.minimum(spatial_size - index % num_chunks * CHUNK, CHUNK).to(tl.float32)
        shift = tl.load(partial_sum_ptr + first + index, mask=index < num_partials, other=0.0) / count - mean
        inner = tl.load(partial_distance_ptr + first + index, mask=index < num_partials, other=0.0)
        sums += tl.where(index < num_partials, inner + count * shift * shift, 0.0)
    variance = tl.sum(sums, axis=0) / group_size
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@jit
def _load_normalized(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offsets, inside, sample, channels, num_channels, num_groups
):
    """Return the normalized input, z, and the weight and inverse deviation of each channel."""
    has_channel = channels < num_channels
    group = sample * num_groups + channels // (num_channels // num_groups)
    mean = tl.load(mean_ptr + group, mask=has_channel, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + group, mask=has_channel, other=0.0)[:, None]
    weight = load_fp32(weight_ptr + channels, has_channel)[:, None]
    bias = load_fp32(bias_ptr + channels, has_channel)[:, None]
    normalized = (load_fp32(x_ptr + offsets, inside) - mean) * rstd
    return normalized, normalized * weight + bias, weight, rstd


@jit
def _apply_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    num_channels,
    num_groups,
    spatial_size,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Normalize and activate one tile; grid `(chunks, tiles of channels, N)`."""
    chunk = tl.program_id(0)
    if REVERSE:
        chunk = tl.num_programs(0) - 1 - chunk
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(2)
    positions = chunk * POSITIONS + tl.arange(0, POSITIONS)
    inside = (channels[:, None] < num_channels) & (positions[None, :] < spatial_size)
    offsets = _offsets(sample, channels, positions, num_channels, spatial_size, CHANNELS_LAST)
    _, z, _, _ = _load_normalized(
        x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offsets, inside, sample, channels, num_channels, num_groups
    )
    store_rounded(output_ptr + offsets, z / (1.0 + tl.exp(-z)), inside)


@jit
def _grad_z(grad_output, z):
    sigmoid = tl.sigmoid(z)
    return grad_output * sigmoid * (1.0 + z * (1.0 - sigmoid))


@jit
def _sums_kernel(
    grad_output_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    product_ptr,
    num_channels,
    num_groups,
    spatial_size,
    num_chunks,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write sum dz and sum dz x^ of each channel and chunk, `(N, C, chunks)`; grid as `_statistics_kernel`."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if REVERSE:
        program = num_programs - 1 - program
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(2)
    has_channel = channels < num_channels
    group = sample * num_groups + channels // (num_channels // num_groups)
    mean = tl.load(mean_ptr + group, mask=has_channel, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + group, mask=has_channel, other=0.0)
    scale = (rstd * load_fp32(weight_ptr + channels, has_channel))[:, None]
    bias = load_fp32(bias_ptr + channels, has_channel)[:, None]
    for chunk in range(program, num_chunks, num_programs):
        sums = tl.zeros((CHANNELS, POSITIONS), tl.float32)
        products = tl.zeros((CHANNELS, POSITIONS), tl.float32)
        for tile in range(TILES):
            positions = (chunk * TILES + tile) * POSITIONS + tl.arange(0, POSITIONS)
            inside = (channels[:, None] < num_channels) & (positions[None, :] < spatial_size)
            offsets = _offsets(sample, channels, positions, num_channels, spatial_size, CHANNELS_LAST)
            centred = load_fp32(x_ptr + offsets, inside) - mean
            grad_z = _grad_z(load_fp32(grad_output_ptr + offsets, inside), centred * scale + bias)
            sums += grad_z
            products += grad_z * centred
        slots = (sample * num_channels + channels) * num_chunks + chunk
        tl.store(sum_ptr + slots, tl.sum(sums, axis=1), mask=has_channel)
        tl.store(product_ptr + slots, tl.sum(products, axis=1) * rstd, mask=has_channel)


@jit
def _merge_sums_kernel(
    sum_ptr,
    product_ptr,
    weight_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    group_sum_ptr,
    group_product_ptr,
    num_samples,
    num_channels,
    num_groups,
    num_chunks,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Add chunks to channels, channels to groups and samples to parameters, in this order; grid `(G,)`."""
    group = tl.program_id(0)
    channels_per_group = num_channels // num_groups
    in_group = tl.arange(0, CHANNELS)
    has_channel = in_group < channels_per_group
    channels = group * channels_per_group + in_group
    weight = load_fp32(weight_ptr + channels, has_channel)
    grad_weight = tl.zeros((CHANNELS,), tl.float32)
    grad_bias = tl.zeros((CHANNELS,), tl.float32)
    for sample in range(0, num_samples):
        sums = tl.zeros((CHANNELS,), tl.float32)
        products = tl.zeros((CHANNELS,), tl.float32)
        for first in range(0, num_chunks, CHUNKS):
            chunks = first + tl.arange(0, CHUNKS)
            slots = (sample * num_channels + channels)[:, None] * num_chunks + chunks[None, :]
            mask = has_channel[:, None] & (chunks < num_chunks)[None, :]
            sums += tl.sum(tl.load(sum_ptr + slots, mask=mask, other=0.0), axis=1)
            products += tl.sum(tl.load(product_ptr + slots, mask=mask, other=0.0), axis=1)
        grad_bias += sums
        grad_weight += products
        tl.store(group_sum_ptr + sample * num_groups + group, tl.sum(sums * weight, axis=0))
        tl.store(group_product_ptr + sample * num_groups + group, tl.sum(products * weight, axis=0))
    store_rounded(grad_weight_ptr + channels, grad_weight, has_channel)
    store_rounded(grad_bias_ptr + channels, grad_bias, has_channel)


@jit
def _grad_input_kernel(
    grad_output_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    group_sum_ptr,
    group_product_ptr,
    grad_x_ptr,
    num_channels,
    num_groups,
    spatial_size,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Write dx of one tile; grid `(chunks, tiles of channels, N)`."""
    chunk = tl.program_id(0)
    if REVERSE:
        chunk = tl.num_programs(0) - 1 - chunk
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(2)
    positions = chunk * POSITIONS + tl.arange(0, POSITIONS)
    inside = (channels[:, None] < num_channels) & (positions[None, :] < spatial_size)
    offsets = _offsets(sample, channels, positions, num_channels, spatial_size, CHANNELS_LAST)
    normalized, z, weight, rstd = _load_normalized(
        x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offsets, inside, sample, channels, num_channels, num_groups
    )
    grad_z = _grad_z(load_fp32(grad_output_ptr + offsets, inside), z)
    channels_per_group = num_channels // num_groups
    group = sample * num_groups + channels // channels_per_group
    size = channels_per_group.to(tl.float32) * spatial_size
    group_sum = tl.load(group_sum_ptr + group, mask=channels < num_channels, other=0.0)[:, None] / size
    group_product = tl.load(group_product_ptr + group, mask=channels < num_channels, other=0.0)[:, None] / size
    grad_x = (weight * grad_z - (group_sum + normalized * group_product)) * rstd
    store_rounded(grad_x_ptr + offsets, grad_x, inside)


class _Plan(NamedTuple):
    """Sizes of one call: what the kernels are launched with."""

    num_samples: int
    num_channels: int
    spatial_size: int
    num_chunks: int
    chunk: int
    rest_of_grid: tuple[int, int]
    tile: dict[str, Any]


def _plan(config: LaunchConfig, x: Tensor, *, half_tiles: bool = False) -> _Plan:
    """Cut positions into tiles and fixed chunks of tiles, on which sums depend, and channels into what fills a tile.

    In channels_last a tile is wide in channels, so it takes several to keep the partial sums few beside the input.
    `half_tiles` makes it half as wide there.
    """
    num_samples, num_channels = x.shape[:2]
    spatial_size = x[0, 0].numel()
    channels_last = _is_channels_last(x)
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
        x: As in `group_norm_silu`, and so are the rest.
        num_groups: See there.
        weight: See there.
        bias: See there.
        eps: See there.

    Returns:
        The output, and fp32 mean and inverse deviation `(N, G)`.
    """
    x = _dense(x)
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
        _statistics_kernel[(config.grid(plan.num_chunks), *plan.rest_of_grid)](
            x, partial[0], partial[1], plan.num_channels, plan.spatial_size, plan.num_chunks,
            TILES=plan.chunk // plan.tile["POSITIONS"], **plan.tile,
        )  # fmt: skip
        _merge_statistics_kernel[(plan.num_samples * num_groups,)](
            partial[0], partial[1], mean, rstd, plan.spatial_size, plan.num_chunks, num_partials,
            float(group_size), eps, CHUNK=plan.chunk, BLOCK=min(1024, next_power_of_2(num_partials)), **config.options,
        )  # fmt: skip
        _apply_kernel[(num_tiles, *plan.rest_of_grid)](
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
    x = _dense(x)
    grad_output = _like(grad_output, x)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    config = launch_config("group_norm_silu", x)
    plan = _plan(config, x)
    # The sums keep five values per channel in registers; half a tile leaves room for as many programs as elsewhere.
    sums_plan = _plan(config, x, half_tiles=True)
    num_groups = mean.shape[1]
    partial = x.new_empty((2, plan.num_samples, plan.num_channels, plan.num_chunks), dtype=torch.float32)
    groups = mean.new_empty((2, *mean.shape))
    channels = next_power_of_2(plan.num_channels // num_groups)
    num_tiles = cdiv(plan.spatial_size, plan.tile["POSITIONS"])
    with device_of(x):
        _sums_kernel[(config.grid(plan.num_chunks), *sums_plan.rest_of_grid)](
            grad_output, x, mean, rstd, weight, bias, partial[0], partial[1], plan.num_channels, num_groups,
            plan.spatial_size, plan.num_chunks, TILES=plan.chunk // plan.tile["POSITIONS"], **sums_plan.tile,
        )  # fmt: skip
        _merge_sums_kernel[(num_groups,)](
            partial[0], partial[1], weight, grad_weight, grad_bias, groups[0], groups[1], plan.num_samples,
            plan.num_channels, num_groups, plan.num_chunks, CHANNELS=channels,
            CHUNKS=min(max(1024 // channels, 1), next_power_of_2(plan.num_chunks)), **config.options,
        )  # fmt: skip
        _grad_input_kernel[(num_tiles, *plan.rest_of_grid)](
            grad_output, x, mean, rstd, weight, bias, groups[0], groups[1], grad_x, plan.num_channels, num_groups,
            plan.spatial_size, **plan.tile,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias


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
