# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""Noisy latents and training target in one pass, with noise that is a function of (seed, step, sample id).

With e the noise, x the clean latents and four coefficients per sample,

    noisy = alpha x + sigma e,    target = target_latents x + target_noise e,

so that the operator works for any noise process. For a diffusion (Ho et al. 2020, arXiv:2006.11239, Eq. 4) the target
coefficients are (0, 1) for e, (1, 0) for x and (-sigma, alpha) for the velocity (Salimans and Ho 2022,
arXiv:2202.00512); for a rectified flow (Liu et al. 2022, arXiv:2209.03003, Eq. 1) they are (-1, 1), with alpha = 1 - t
and sigma = t.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import cdiv, jit, load_fp32, or_dummy, program_index, store_rounded, tl
from .dispatch import register, uses_kernel
from .launch import device_of, launch_config
from .operators import custom_op
from .philox import Stream, as_int32, normal_block, split_seed, standard_normal_eager

STREAM_NOISE = tl.constexpr(int(Stream.NOISE))
STREAM_POSTERIOR = tl.constexpr(int(Stream.POSTERIOR))
STREAM_OFFSET = tl.constexpr(int(Stream.OFFSET))
STREAM_PERTURBATION = tl.constexpr(int(Stream.PERTURBATION))


class NoiseCoefficients(NamedTuple):
    """Coefficients of each sample's latents and noise; fp32 `(B,)` each.

    Attributes:
        alpha: Coefficient of the clean latents in the noisy latents.
        sigma: Coefficient of the noise in the noisy latents.
        target_latents: Coefficient of the clean latents in the target.
        target_noise: Coefficient of the noise in the target.
    """

    alpha: Tensor
    sigma: Tensor
    target_latents: Tensor
    target_noise: Tensor


class NoiseOperands(NamedTuple):
    """Operands of the operator and of its twins: those of `noise`, with the seed as two signed words."""

    latents: Tensor
    alpha: Tensor
    sigma: Tensor
    target_latents: Tensor
    target_noise: Tensor
    std: Tensor | None
    sample_ids: Tensor
    seed_low: int
    seed_high: int
    step: int
    noise_offset: float
    input_perturbation: float


def noise(
    latents: Tensor,
    coefficients: NoiseCoefficients,
    *,
    std: Tensor | None = None,
    seed: int,
    step: int,
    sample_ids: Tensor,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute noisy latents and the training target.

    With e the noise and x the clean latents, the noisy latents are alpha x + sigma (e + input_perturbation e'). The
    target with coefficients (0, 1) is e itself and that with (1, 0) is x itself, bit for bit, even if the other is not
    finite.

    Args:
        latents: Clean latents `(B, C, ...)`, already scaled; the posterior's means if `std` is given.
        coefficients: Coefficients of each sample, contiguous and on the same device.
        std: The posterior's standard deviations, scaled like the latents, from which x is then drawn.
        seed: 64-bit seed.
        step: Training step in [0, 2^32).
        sample_ids: int64 `(B,)` in [0, 2^56).
        noise_offset: Adds this times one normal per sample and channel to the noise.
        input_perturbation: Adds this times new normals to the noise in the noisy latents, not in the target
            (Ning et al. 2023, arXiv:2301.11706).

    Returns:
        Noisy latents and target, both fp32 and contiguous.

    Raises:
        ValueError: The step is out of range, or a coefficient is not one fp32 number for each sample.
    """
    if not 0 <= step < 2**32:
        raise ValueError(f"step={step} is outside [0, 2^32)")
    for name, values in coefficients._asdict().items():
        if values.dtype != torch.float32 or values.shape != latents.shape[:1]:
            raise ValueError(
                f"{name} is {values.dtype} with shape {tuple(values.shape)}; it needs one fp32 number for each of the "
                f"{latents.shape[0]} samples"
            )
    seed_low, seed_high = split_seed(seed)
    operands = NoiseOperands(
        latents, *coefficients, std, sample_ids, as_int32(seed_low), as_int32(seed_high), step, noise_offset,
        input_perturbation,
    )  # fmt: skip
    return _noise_op(*operands)


def _serve(operands: NoiseOperands) -> tuple[Tensor, Tensor]:
    return (noise_triton if uses_kernel("noise", operands.latents) else noise_eager)(operands)


_noise_op = custom_op("noise", _serve, NoiseOperands, tuple[Tensor, Tensor])


@_noise_op.register_fake
def _(latents: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    noisy, target = (latents.new_empty(latents.shape, dtype=torch.float32) for _ in range(2))
    return noisy, target


# --- plain PyTorch ---


def noise_eager(operands: NoiseOperands) -> tuple[Tensor, Tensor]:
    """Twin of `noise_triton` in plain PyTorch."""
    latents, std, sample_ids, step = operands.latents, operands.std, operands.sample_ids, operands.step
    seed = (operands.seed_low & 0xFFFFFFFF) | (operands.seed_high & 0xFFFFFFFF) << 32
    shape = latents.shape

    def draw(stream: Stream, shape: torch.Size = shape) -> Tensor:
        flat = standard_normal_eager(shape[1:].numel(), sample_ids, seed=seed, step=step, stream=stream)
        return flat.reshape(shape)

    clean = latents.to(torch.float32)
    if std is not None:
        clean = clean + std.to(torch.float32) * draw(Stream.POSTERIOR)
    target_noise = draw(Stream.NOISE)
    if operands.noise_offset != 0:
        offset = draw(Stream.OFFSET, shape[:2]) * operands.noise_offset
        target_noise = target_noise + offset.reshape(*shape[:2], *[1] * (len(shape) - 2))
    seen_noise = target_noise
    if operands.input_perturbation != 0:
        seen_noise = target_noise + operands.input_perturbation * draw(Stream.PERTURBATION)
    per_sample = (-1, *[1] * (len(shape) - 1))
    alpha, sigma, of_latents, of_noise = (values.reshape(per_sample) for values in operands[1:5])
    noisy = alpha * clean + sigma * seen_noise
    target = of_latents * clean + of_noise * target_noise
    target = torch.where((of_latents == 1) & (of_noise == 0), clean, target)
    target = torch.where((of_latents == 0) & (of_noise == 1), target_noise, target)
    return noisy.contiguous(), target.contiguous()


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
    alpha_ptr,
    sigma_ptr,
    target_latents_ptr,
    target_noise_ptr,
    std_ptr,
    sample_ids_ptr,
    offset_ptr,
    noisy_ptr,
    target_ptr,
    num_elements,
    spatial_size,
    num_channels,
    seed_low,
    seed_high,
    step,
    input_perturbation,
    HAS_STD: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_PERTURBATION: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one chunk of one sample; grid `(chunks, B)`."""
    chunk = program_index(REVERSE)
    sample = tl.program_id(1)
    elements = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = elements < num_elements
    offsets = sample.to(tl.int64) * num_elements + elements
    alpha = tl.load(alpha_ptr + sample)
    sigma = tl.load(sigma_ptr + sample)
    of_latents = tl.load(target_latents_ptr + sample)
    of_noise = tl.load(target_noise_ptr + sample)
    sample_id = tl.load(sample_ids_ptr + sample)
    first_quad = chunk * (BLOCK // 4)

    clean = load_fp32(latents_ptr + offsets, mask)
    if HAS_STD:
        normals = normal_block(first_quad, sample_id, step, seed_low, seed_high, STREAM_POSTERIOR, BLOCK)
        clean += load_fp32(std_ptr + offsets, mask) * normals
    target_noise = normal_block(first_quad, sample_id, step, seed_low, seed_high, STREAM_NOISE, BLOCK)
    if HAS_OFFSET:
        target_noise += tl.load(offset_ptr + sample * num_channels + elements // spatial_size, mask=mask, other=0.0)
    seen_noise = target_noise
    if HAS_PERTURBATION:
        normals = normal_block(first_quad, sample_id, step, seed_low, seed_high, STREAM_PERTURBATION, BLOCK)
        seen_noise = target_noise + input_perturbation * normals
    store_rounded(noisy_ptr + offsets, alpha * clean + sigma * seen_noise, mask)
    target = of_latents * clean + of_noise * target_noise
    target = tl.where((of_latents == 1.0) & (of_noise == 0.0), clean, target)
    target = tl.where((of_latents == 0.0) & (of_noise == 1.0), target_noise, target)
    store_rounded(target_ptr + offsets, target, mask)


def noise_triton(operands: NoiseOperands) -> tuple[Tensor, Tensor]:
    """Launch the kernels."""
    latents = operands.latents.contiguous()
    std = None if operands.std is None else operands.std.contiguous()
    noisy, target = (torch.empty_like(latents, dtype=torch.float32) for _ in range(2))
    if latents.numel() == 0:
        return noisy, target
    config = launch_config("noise", latents)
    num_samples, num_channels = latents.shape[0], latents.shape[1]
    num_elements = latents.numel() // num_samples
    key = (operands.seed_low, operands.seed_high, as_int32(operands.step))
    ids, noise_offset, perturbation = operands.sample_ids, operands.noise_offset, operands.input_perturbation
    offset = latents.new_empty((num_samples, num_channels) if noise_offset else (0,), dtype=torch.float32)
    with device_of(latents):
        if noise_offset:
            _offset_kernel[(cdiv(num_channels, 16), num_samples)](
                offset, ids, num_channels, noise_offset, *key, BLOCK=16, **config.options
            )
        _noise_kernel[(cdiv(num_elements, config.block), num_samples)](
            latents, *operands[1:5], or_dummy(std, latents), ids, offset, noisy, target, num_elements,
            num_elements // num_channels, num_channels, *key, perturbation, HAS_STD=std is not None,
            HAS_OFFSET=noise_offset != 0, HAS_PERTURBATION=perturbation != 0, REVERSE=config.reverse,
            BLOCK=config.block, **config.options,
        )  # fmt: skip
    return noisy, target


def _self_test(device: torch.device) -> None:
    latents = torch.linspace(-3, 3, 3 * 4 * 15, device=device).reshape(3, 4, 15)
    rows = ((0.999, 0.1, 0.5), (0.04, 0.99, 0.5), (0.0, 1.0, -1.0), (1.0, 0.0, 1.0))
    operands = NoiseOperands(
        latents, *NoiseCoefficients(*(torch.tensor(row, device=device) for row in rows)), latents.abs(),
        torch.tensor([5, 2**40, 6], device=device), 7, -9, 11, 0.1, 0.1,
    )  # fmt: skip
    pairs = zip(("noisy", "target"), noise_triton(operands), noise_eager(operands), strict=True)
    for name, got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


register("noise", _self_test)
