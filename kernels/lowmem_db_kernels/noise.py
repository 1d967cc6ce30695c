# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""Noisy latents and training target in one pass, with noise that is a function of (seed, step, sample id).

References: Ho et al. 2020, arXiv:2006.11239, Eq. 4 (noising); Salimans and Ho 2022, arXiv:2202.00512 (velocity).
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from ._triton import cdiv, jit, load_fp32, or_dummy, program_index, store_rounded, tl
from .dispatch import register, uses_kernel
from .launch import device_of, launch_config
from .philox import Stream, as_int32, normal_block, split_seed, standard_normal_eager

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

EPSILON = tl.constexpr(0)
V_PREDICTION = tl.constexpr(1)
STREAM_NOISE = tl.constexpr(int(Stream.NOISE))
STREAM_POSTERIOR = tl.constexpr(int(Stream.POSTERIOR))
STREAM_OFFSET = tl.constexpr(int(Stream.OFFSET))
STREAM_PERTURBATION = tl.constexpr(int(Stream.PERTURBATION))


class NoiseTables(NamedTuple):
    """Coefficients of the forward process per timestep, fp32, made in float64.

    Attributes:
        sqrt_alphas_cumprod: Shape `(T,)`.
        sqrt_one_minus_alphas_cumprod: Shape `(T,)`.
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor


def noise_tables(alphas_cumprod: Tensor) -> NoiseTables:
    """Build the coefficient tables of `noise`.

    Args:
        alphas_cumprod: Cumulative products of the schedule, shape `(T,)`; float64 loses least.

    Returns:
        The tables on the same device.
    """
    exact = alphas_cumprod.to(torch.float64)
    return NoiseTables(exact.sqrt().to(torch.float32), (1.0 - exact).sqrt().to(torch.float32))


def noise(
    latents: Tensor,
    timesteps: Tensor,
    tables: NoiseTables,
    *,
    std: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    step: int | None = None,
    sample_ids: Tensor | None = None,
    prediction_type: PredictionType = "epsilon",
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Noise latents and form the training target.

    With e the noise, x the clean latents, a and s the two coefficients of a sample's timestep:
    the noisy latents are a x + s (e + input_perturbation e'), the target is e, a e - s x, or x.

    Args:
        latents: Clean latents `(B, C, ...)`, already scaled; the posterior's means where `std` is given.
        timesteps: int64 `(B,)`.
        tables: From `noise_tables`, on the same device.
        std: The posterior's standard deviations, scaled like the latents; x is then drawn here.
        noise: Standard normal noise of the latents' shape; drawn here if not given.
        seed: 64-bit seed; needed where anything is drawn.
        step: Training step in [0, 2^32); needed where anything is drawn.
        sample_ids: int64 `(B,)` in [0, 2^56); needed where anything is drawn.
        prediction_type: What the model predicts.
        noise_offset: Adds this times one normal per sample and channel to the noise.
        input_perturbation: Adds this times fresh normals to what the model sees, not to the target
            (Ning et al. 2023, arXiv:2301.11706).
        out_dtype: Type of the noisy latents.

    Returns:
        Noisy latents in `out_dtype` and the target in fp32, both contiguous.

    Raises:
        ValueError: Something must be drawn and seed, step or sample ids are missing, or a value is out of its range.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
    draws = std is not None or noise is None or noise_offset != 0 or input_perturbation != 0
    _check_draw(draws, seed, step, sample_ids)
    seed_low, seed_high = split_seed(seed or 0)
    return _noise_op(
        latents, timesteps, *tables, std, noise, sample_ids, as_int32(seed_low), as_int32(seed_high), step or 0,
        prediction_type, noise_offset, input_perturbation, out_dtype,
    )  # fmt: skip


def _check_draw(draws: bool, seed: int | None, step: int | None, sample_ids: Tensor | None) -> None:
    given = {"seed": seed, "step": step, "sample_ids": sample_ids}
    missing = [name for name, value in given.items() if value is None]
    if draws and missing:
        raise ValueError(f"random numbers are drawn here, so noise() needs {', '.join(missing)}")
    if step is not None and not 0 <= step < 2**32:
        raise ValueError(f"step={step} is outside [0, 2^32)")


@torch.library.custom_op(add_op_namespace_prefix("noise"), mutates_args=())
def _noise_op(
    latents: Tensor,
    timesteps: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    std: Tensor | None,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    seed_low: int,
    seed_high: int,
    step: int,
    prediction_type: str,
    noise_offset: float,
    input_perturbation: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    serve = noise_triton if uses_kernel("noise", latents) else noise_eager
    return serve(
        latents, timesteps, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, std, noise, sample_ids, seed_low,
        seed_high, step, prediction_type, noise_offset, input_perturbation, out_dtype,
    )  # fmt: skip


@_noise_op.register_fake
def _(latents: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out_dtype = arguments[-1]
    return latents.new_empty(latents.shape, dtype=out_dtype), latents.new_empty(latents.shape, dtype=torch.float32)


# --- plain PyTorch ---


def noise_eager(
    latents: Tensor,
    timesteps: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    std: Tensor | None,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    seed_low: int,
    seed_high: int,
    step: int,
    prediction_type: str,
    noise_offset: float,
    input_perturbation: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Twin of `noise_triton` in plain PyTorch; arguments as there."""
    seed = (seed_low & 0xFFFFFFFF) | (seed_high & 0xFFFFFFFF) << 32
    shape = latents.shape

    def draw(stream: Stream, shape: torch.Size = shape) -> Tensor:
        assert sample_ids is not None
        flat = standard_normal_eager(shape[1:].numel(), sample_ids, seed=seed, step=step, stream=stream)
        return flat.reshape(shape)

    clean = latents.to(torch.float32)
    if std is not None:
        clean = clean + std.to(torch.float32) * draw(Stream.POSTERIOR)
    target_noise = draw(Stream.NOISE) if noise is None else noise.to(torch.float32)
    if noise_offset != 0:
        offset = draw(Stream.OFFSET, shape[:2]) * noise_offset
        target_noise = target_noise + offset.reshape(*shape[:2], *[1] * (len(shape) - 2))
    seen_noise = target_noise
    if input_perturbation != 0:
        seen_noise = target_noise + input_perturbation * draw(Stream.PERTURBATION)
    per_sample = (-1, *[1] * (len(shape) - 1))
    alpha = sqrt_alphas_cumprod[timesteps].reshape(per_sample)
    sigma = sqrt_one_minus_alphas_cumprod[timesteps].reshape(per_sample)
    noisy = alpha * clean + sigma * seen_noise
    if prediction_type == "epsilon":
        target = target_noise
    elif prediction_type == "v_prediction":
        target = alpha * target_noise - sigma * clean
    else:
        target = clean
    return _fresh(noisy.to(out_dtype)), _fresh(target, latents, noise)


def _fresh(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return a contiguous tensor that shares no memory with an input, as an operator's result must."""
    if any(tensor is not None and tensor.data_ptr() == result.data_ptr() for tensor in inputs):
        return result.clone(memory_format=torch.contiguous_format)
    return result.contiguous()


# --- Triton ---


@jit(unspecialized=("seed_low", "seed_high", "step"))
def _offset_kernel(
    offset_ptr, sample_ids_ptr, num_channels, noise_offset, seed_low, seed_high, step, BLOCK: tl.constexpr
):
    """Draw one scaled normal per sample and channel; grid `(chunks of channels, B)`."""
    sample = tl.program_id(1)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample_id = tl.load(sample_ids_ptr + sample)
    normals = normal_block(tl.program_id(0) * (BLOCK // 4), sample_id, step, seed_low, seed_high, STREAM_OFFSET, BLOCK)
    tl.store(offset_ptr + sample * num_channels + channels, normals * noise_offset, mask=channels < num_channels)


@jit(unspecialized=("seed_low", "seed_high", "step"))
def _noise_kernel(
    latents_ptr,
    std_ptr,
    noise_ptr,
    offset_ptr,
    noisy_ptr,
    target_ptr,
    timesteps_ptr,
    sample_ids_ptr,
    sqrt_alphas_cumprod_ptr,
    sqrt_one_minus_alphas_cumprod_ptr,
    num_elements,
    spatial_size,
    num_channels,
    seed_low,
    seed_high,
    step,
    input_perturbation,
    PREDICTION_TYPE: tl.constexpr,
    HAS_STD: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_PERTURBATION: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Noise one chunk of one sample; grid `(chunks, B)`."""
    chunk = program_index(REVERSE)
    sample = tl.program_id(1)
    elements = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = elements < num_elements
    offsets = sample.to(tl.int64) * num_elements + elements
    timestep = tl.load(timesteps_ptr + sample)
    alpha = tl.load(sqrt_alphas_cumprod_ptr + timestep)
    sigma = tl.load(sqrt_one_minus_alphas_cumprod_ptr + timestep)
    sample_id = tl.load(sample_ids_ptr + sample)
    first_quad = chunk * (BLOCK // 4)

    clean = load_fp32(latents_ptr + offsets, mask)
    if HAS_STD:
        normals = normal_block(first_quad, sample_id, step, seed_low, seed_high, STREAM_POSTERIOR, BLOCK)
        clean += load_fp32(std_ptr + offsets, mask) * normals
    if HAS_NOISE:
        target_noise = load_fp32(noise_ptr + offsets, mask)
    else:
        target_noise = normal_block(first_quad, sample_id, step, seed_low, seed_high, STREAM_NOISE, BLOCK)
    if HAS_OFFSET:
        target_noise += tl.load(offset_ptr + sample * num_channels + elements // spatial_size, mask=mask, other=0.0)
    seen_noise = target_noise
    if HAS_PERTURBATION:
        normals = normal_block(first_quad, sample_id, step, seed_low, seed_high, STREAM_PERTURBATION, BLOCK)
        seen_noise = target_noise + input_perturbation * normals
    store_rounded(noisy_ptr + offsets, alpha * clean + sigma * seen_noise, mask)
    if PREDICTION_TYPE == EPSILON:
        target = target_noise
    elif PREDICTION_TYPE == V_PREDICTION:
        target = alpha * target_noise - sigma * clean
    else:
        target = clean
    store_rounded(target_ptr + offsets, target, mask)


def noise_triton(
    latents: Tensor,
    timesteps: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    std: Tensor | None,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    seed_low: int,
    seed_high: int,
    step: int,
    prediction_type: str,
    noise_offset: float,
    input_perturbation: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels.

    Args:
        latents: As in `noise`, and so are the other tensors.
        timesteps: As in `noise`.
        sqrt_alphas_cumprod: fp32 `(T,)`.
        sqrt_one_minus_alphas_cumprod: fp32 `(T,)`.
        std: As in `noise`.
        noise: As in `noise`.
        sample_ids: As in `noise`.
        seed_low: Low word of the seed, as a signed integer.
        seed_high: High word of the seed, as a signed integer.
        step: As in `noise`.
        prediction_type: As in `noise`.
        noise_offset: As in `noise`.
        input_perturbation: As in `noise`.
        out_dtype: As in `noise`.

    Returns:
        As `noise`.
    """
    latents = latents.contiguous()
    noisy, target = torch.empty_like(latents, dtype=out_dtype), torch.empty_like(latents, dtype=torch.float32)
    if latents.numel() == 0:
        return noisy, target
    config = launch_config("noise", latents)
    num_samples, num_channels = latents.shape[0], latents.shape[1]
    num_elements = latents.numel() // num_samples
    key = (seed_low, seed_high, as_int32(step))
    ids = or_dummy(sample_ids, timesteps)
    offset = latents.new_empty((num_samples, num_channels) if noise_offset else (0,), dtype=torch.float32)
    with device_of(latents):
        if noise_offset:
            _offset_kernel[(cdiv(num_channels, 16), num_samples)](
                offset, ids, num_channels, noise_offset, *key, BLOCK=16, **config.options
            )
        _noise_kernel[(cdiv(num_elements, config.block), num_samples)](
            latents, _contiguous_or(std, latents), _contiguous_or(noise, latents), offset, noisy, target, timesteps,
            ids, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, num_elements, num_elements // num_channels,
            num_channels, *key, input_perturbation, PREDICTION_TYPE=PREDICTION_TYPES.index(prediction_type),
            HAS_STD=std is not None, HAS_NOISE=noise is not None, HAS_OFFSET=noise_offset != 0,
            HAS_PERTURBATION=input_perturbation != 0, REVERSE=config.reverse, BLOCK=config.block, **config.options,
        )  # fmt: skip
    return noisy, target


def _contiguous_or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    return or_dummy(None if tensor is None else tensor.contiguous(), stand_in)


def _self_test(device: torch.device) -> None:
    latents = torch.linspace(-3, 3, 2 * 4 * 15, device=device).reshape(2, 4, 15)
    tables = noise_tables(torch.linspace(0.999, 0.01, 10, dtype=torch.float64, device=device))
    arguments: tuple[Any, ...] = (
        latents, torch.tensor([0, 9], device=device), *tables, latents.abs(), None,
        torch.tensor([5, 2**40], device=device), 7, -9, 11, "v_prediction", 0.1, 0.1, torch.float32,
    )  # fmt: skip
    pairs = zip(("noisy", "target"), noise_triton(*arguments), noise_eager(*arguments), strict=True)
    for name, got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


register("noise", _self_test)
