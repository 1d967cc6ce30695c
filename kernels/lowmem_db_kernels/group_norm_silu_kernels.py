# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""Device code of `group_norm_silu`: statistics, normalization, sums of the backward pass and gradient of the input."""

from ._triton import jit, load_fp32, store_rounded, tl


@jit
def _offsets(sample, channels, positions, num_channels, spatial_size, CHANNELS_LAST: tl.constexpr):
    """Return the offsets of a tile of channels (rows) and positions (columns), contiguous in storage order."""
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

    Grid `(programs, tiles of channels, N)`; a program processes several chunks with a fixed stride.
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
        # All chunks of a channel except the last one are full.
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
