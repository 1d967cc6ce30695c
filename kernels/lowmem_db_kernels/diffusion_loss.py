# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""Diffusion loss and its gradient in one pass over the prediction.

With w_b the weight of a sample, n its elements and r the elementwise loss of prediction minus target,

    loss_b = w_b / n * sum_i r_i,    instance = mean of loss_b over the first num_instance samples,
    prior = mean over the others,    total = instance + prior_loss_weight * prior,

Eq. 2 of Ruiz et al. 2022, arXiv:2208.12242. Weighting schemes and timesteps are up to the caller. Nothing is read back
to the host and nothing is added atomically: equal inputs give equal bits.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._triton import cdiv, jit, load_fp32, next_power_of_2, or_dummy, store_rounded, tl
from .dispatch import register, uses_kernel
from .launch import device_of, launch_config
from .operators import custom_op

LossKind = Literal["mse", "huber", "l1"]
LOSS_KINDS = ("mse", "huber", "l1")
_NUM_PARTS = 4
# The smallest magnitude that no longer rounds to a finite number.
_OVERFLOW = {torch.float32: float("inf"), torch.float16: 65520.0, torch.bfloat16: 3.3961775292304957e38}

MSE = tl.constexpr(0)
HUBER = tl.constexpr(1)


@dataclass(frozen=True)
class DiffusionLoss:
    """The result of `diffusion_loss`: views of one fp32 tensor on the device.

    Attributes:
        packed: `(total, instance, prior, finite, loss of each sample ...)`, without gradient.
        total: Scalar; the only part with a gradient.
    """

    packed: Tensor
    total: Tensor

    @property
    def instance(self) -> Tensor:
        """Mean loss of the instance samples; 0 if there are none."""
        return self.packed[1]

    @property
    def prior(self) -> Tensor:
        """Mean loss of the prior samples, without `prior_loss_weight`; 0 if there are none."""
        return self.packed[2]

    @property
    def finite(self) -> Tensor:
        """1 if the loss and every element of the stored gradient are finite, else 0."""
        return self.packed[3]

    @property
    def per_sample(self) -> Tensor:
        """Weighted loss of each sample, shape `(B,)`."""
        return self.packed[_NUM_PARTS:]


class LossOperands(NamedTuple):
    """Operands of the operator and of its twins; those not listed are as in `diffusion_loss`.

    Attributes:
        huber_c: fp32 `(B,)`; None for the other kinds.
        kind: Index into `LOSS_KINDS`.
    """

    prediction: Tensor
    target: Tensor
    weights: Tensor
    huber_c: Tensor | None
    num_instance: int
    prior_loss_weight: float
    kind: int


def diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    num_instance: int,
    prior_loss_weight: float = 1.0,
    kind: LossKind = "mse",
    huber_c: float | Tensor | None = None,
) -> DiffusionLoss:
    """Compute the loss of a batch of instance and prior samples, together with its gradient.

    Args:
        prediction: `(B, C, ...)`; with `2 C` channels the second half is a learned variance and gets a zero gradient.
        target: `(B, C, ...)`.
        weights: fp32 `(B,)`, the weight of each sample's loss.
        num_instance: Number of instance samples, which come first; the rest are prior samples.
        prior_loss_weight: Lambda of Eq. 2.
        kind: `mse` d^2; `huber` 2 c (sqrt(d^2 + c^2) - c); `l1` |d|.
        huber_c: c of the pseudo-Huber loss: a number, or fp32 `(B,)`.

    Returns:
        The losses; `total` has a gradient if the prediction requires one.

    Raises:
        ValueError: An argument is out of range or the shapes do not match.
    """
    _check(prediction, target, weights, num_instance, kind, huber_c)
    c = torch.full_like(weights, huber_c) if isinstance(huber_c, int | float) else huber_c
    operands = LossOperands(prediction, target, weights, c, num_instance, prior_loss_weight, LOSS_KINDS.index(kind))
    packed, _ = _loss_op(*operands)
    return DiffusionLoss(packed.detach(), packed[0])


def _check(
    prediction: Tensor, target: Tensor, weights: Tensor, num_instance: int, kind: str, huber_c: float | Tensor | None
) -> None:
    if kind not in LOSS_KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(LOSS_KINDS)}")
    if (kind == "huber") != (huber_c is not None):
        raise ValueError("huber_c is required for kind='huber', and not allowed for others")
    if not 0 <= num_instance <= prediction.shape[0]:
        raise ValueError(f"num_instance={num_instance} is outside [0, {prediction.shape[0]}]")
    batch, channels, *spatial = target.shape
    if list(prediction.shape) not in ([batch, channels, *spatial], [batch, 2 * channels, *spatial]):
        raise ValueError(f"prediction {tuple(prediction.shape)} does not fit target {tuple(target.shape)}")
    for name, tensor in (("weights", weights), ("huber_c", huber_c)):
        if isinstance(tensor, Tensor) and tensor.shape != (batch,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {(batch,)}: one number for each sample")


def _serve(operands: LossOperands) -> tuple[Tensor, Tensor]:
    prediction = operands.prediction
    gradient = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    serve = diffusion_loss_triton if uses_kernel("diffusion_loss", prediction) else diffusion_loss_eager
    return serve(operands._replace(prediction=prediction.contiguous()), gradient), gradient


_loss_op = custom_op("diffusion_loss", _serve, LossOperands, tuple[Tensor, Tensor])


@_loss_op.register_fake
def _(prediction: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    packed = prediction.new_empty((_NUM_PARTS + prediction.shape[0],), dtype=torch.float32)
    return packed, torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _save_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _scale_gradient(ctx: Any, grad_packed: Tensor, grad_gradient: Tensor) -> tuple:
    (gradient,) = ctx.saved_tensors
    return gradient * grad_packed[0], *[None] * (len(LossOperands._fields) - 1)


_loss_op.register_autograd(_scale_gradient, setup_context=_save_gradient)


def _part_weight(prior_loss_weight: float, num_samples: int, num_instance: int) -> tuple[float, float]:
    """Return the weights of one instance and one prior sample in the total."""
    num_prior = num_samples - num_instance
    return 1.0 / max(num_instance, 1), prior_loss_weight / max(num_prior, 1)


# --- plain PyTorch ---


def diffusion_loss_eager(operands: LossOperands, gradient: Tensor) -> Tensor:
    """Twin of `diffusion_loss_triton` in plain PyTorch."""
    prediction, target, weights, c, num_instance, prior_loss_weight, kind = operands
    num_samples, num_channels = target.shape[:2]
    per_sample = (-1, *[1] * (target.ndim - 1))
    difference = prediction[:, :num_channels].to(torch.float32) - target.to(torch.float32)
    value, slope = _elementwise(difference, LOSS_KINDS[kind], None if c is None else c.reshape(per_sample))
    weight = weights / max(target[:1].numel(), 1)
    losses = value.flatten(1).sum(1) * weight
    instance_share, prior_share = _part_weight(prior_loss_weight, num_samples, num_instance)
    share = torch.full_like(weight, prior_share)
    share[:num_instance] = instance_share
    gradient[:, :num_channels] = slope * (weight * share).reshape(per_sample)
    gradient[:, num_channels:] = 0
    instance = losses[:num_instance].sum() / max(num_instance, 1)
    prior = losses[num_instance:].sum() / max(num_samples - num_instance, 1)
    total = instance + prior_loss_weight * prior
    finite = (torch.isfinite(gradient).all() & torch.isfinite(total)).to(torch.float32)
    return torch.cat([torch.stack([total, instance, prior, finite]), losses])


def _elementwise(difference: Tensor, kind: str, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the loss of each element and its derivative."""
    if kind == "mse":
        return difference * difference, 2.0 * difference
    if kind == "l1":
        # sign() of NaN is 0, and a NaN must not turn into a gradient of 0.
        return difference.abs(), torch.where(difference.isnan(), difference, difference.sign())
    assert c is not None
    root = torch.sqrt(difference * difference + c * c)
    # sqrt(d^2 + c^2) - c, without the cancellation.
    return 2.0 * c * (difference * difference / (root + c)), 2.0 * c * difference / root


# --- Triton ---


@jit
def _elementwise_triton(difference, c, KIND: tl.constexpr):
    """Device form of `_elementwise`."""
    if KIND == MSE:
        value = difference * difference
        slope = 2.0 * difference
    elif KIND == HUBER:
        root = tl.sqrt(difference * difference + c * c)
        value = 2.0 * c * (difference * difference / (root + c))
        slope = 2.0 * c * difference / root
    else:
        value = tl.abs(difference)
        slope = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    return value, slope


@jit
def _loss_kernel(
    prediction_ptr,
    target_ptr,
    gradient_ptr,
    partial_ptr,
    weights_ptr,
    huber_c_ptr,
    sample_size,
    num_chunks,
    num_instance,
    elements_per_sample,
    instance_share,
    prior_share,
    overflow,
    KIND: tl.constexpr,
    LEARNED_VARIANCE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient, and per chunk the sum of losses and the number of gradients that overflow.

    Grid `(programs, B)`; `partial` is `(2, B, chunks)`. `elements_per_sample` is `sample_size` as a float.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if REVERSE:
        program = num_programs - 1 - program
    sample = tl.program_id(1)
    weight = tl.div_rn(tl.load(weights_ptr + sample), elements_per_sample)
    scale = weight * tl.where(sample < num_instance, instance_share, prior_share)
    c = 1.0
    if KIND == HUBER:
        c = tl.load(huber_c_ptr + sample)
    row = sample.to(tl.int64)
    prediction_row = row
    if LEARNED_VARIANCE:
        prediction_row = row * 2
    partial_size = tl.num_programs(1) * num_chunks
    for chunk in range(program, num_chunks, num_programs):
        positions = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = positions < sample_size
        prediction_offsets = prediction_row * sample_size + positions
        prediction = load_fp32(prediction_ptr + prediction_offsets, inside)
        target = load_fp32(target_ptr + row * sample_size + positions, inside)
        value, slope = _elementwise_triton(prediction - target, c, KIND)
        gradient = slope * scale
        store_rounded(gradient_ptr + prediction_offsets, gradient, inside)
        if LEARNED_VARIANCE:
            variance_offsets = (prediction_row + 1) * sample_size + positions
            store_rounded(gradient_ptr + variance_offsets, tl.zeros_like(gradient), inside)
        overflows = inside & ((tl.abs(gradient) < overflow) == 0)
        slot = partial_ptr + row * num_chunks + chunk
        tl.store(slot, tl.sum(tl.where(inside, value, 0.0), axis=0))
        tl.store(slot + partial_size, tl.sum(overflows.to(tl.float32), axis=0))


@jit
def _finish_kernel(
    partial_ptr,
    packed_ptr,
    weights_ptr,
    num_samples,
    num_partials,
    num_instance,
    elements_per_sample,
    prior_loss_weight,
    num_instance_or_1,
    num_prior_or_1,
    BLOCK: tl.constexpr,
):
    """Add the partial sums in a fixed order and write the packed result; grid `(1,)`."""
    instance = 0.0
    prior = 0.0
    overflows = 0.0
    for sample in range(0, num_samples):
        sums = tl.zeros((BLOCK,), tl.float32)
        counts = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, num_partials, BLOCK):
            index = first + tl.arange(0, BLOCK)
            offsets = sample * num_partials + index
            sums += tl.load(partial_ptr + offsets, mask=index < num_partials, other=0.0)
            counts += tl.load(partial_ptr + num_samples * num_partials + offsets, mask=index < num_partials, other=0.0)
        weight = tl.div_rn(tl.load(weights_ptr + sample), elements_per_sample)
        loss = tl.sum(sums, axis=0) * weight
        overflows += tl.sum(counts, axis=0)
        tl.store(packed_ptr + 4 + sample, loss)
        instance += tl.where(sample < num_instance, loss, 0.0)
        prior += tl.where(sample < num_instance, 0.0, loss)
    instance = tl.div_rn(instance, num_instance_or_1)
    prior = tl.div_rn(prior, num_prior_or_1)
    total = instance + prior_loss_weight * prior
    finite = (overflows == 0.0) & (tl.abs(total) < float("inf"))
    tl.store(packed_ptr, total)
    tl.store(packed_ptr + 1, instance)
    tl.store(packed_ptr + 2, prior)
    tl.store(packed_ptr + 3, finite.to(tl.float32))


def diffusion_loss_triton(operands: LossOperands, gradient: Tensor) -> Tensor:
    """Launch the kernels.

    Args:
        operands: The prediction is contiguous.
        gradient: Written; contiguous, of the prediction's shape and type.

    Returns:
        The packed result, see `DiffusionLoss`.
    """
    prediction, target, weights, c, num_instance, prior_loss_weight, kind = operands
    packed = prediction.new_zeros((_NUM_PARTS + prediction.shape[0],), dtype=torch.float32)
    if target.numel() == 0:
        packed[3] = 1.0
        return packed
    config = launch_config("diffusion_loss", prediction)
    num_samples = target.shape[0]
    sample_size = target.numel() // num_samples
    num_chunks = cdiv(sample_size, config.block)
    partial = prediction.new_empty((2, num_samples, num_chunks), dtype=torch.float32)
    shares = _part_weight(prior_loss_weight, num_samples, num_instance)
    weights = weights.contiguous()
    with device_of(prediction):
        _loss_kernel[(config.grid(num_chunks), num_samples)](
            prediction, target.contiguous(), gradient, partial, weights, or_dummy(c, weights), sample_size,
            num_chunks, num_instance, float(sample_size), *shares, _OVERFLOW[gradient.dtype], KIND=kind,
            LEARNED_VARIANCE=prediction.shape[1] != target.shape[1], REVERSE=config.reverse, BLOCK=config.block,
            **config.options,
        )  # fmt: skip
        _finish_kernel[(1,)](
            partial, packed, weights, num_samples, num_chunks, num_instance, float(sample_size), prior_loss_weight,
            float(max(num_instance, 1)), float(max(num_samples - num_instance, 1)),
            BLOCK=min(1024, next_power_of_2(num_chunks)), **config.options,
        )  # fmt: skip
    return packed


def _self_test(device: torch.device) -> None:
    prediction = torch.linspace(-2, 3, 3 * 8 * 49, device=device).reshape(3, 8, 7, 7)
    target = torch.linspace(2, -1, 3 * 4 * 49, device=device).reshape(3, 4, 7, 7)
    weights = torch.tensor([0.5, 2.0, 1.0], device=device)
    operands = LossOperands(prediction, target, weights, weights, 2, 0.7, LOSS_KINDS.index("huber"))
    results = []
    for serve in (diffusion_loss_triton, diffusion_loss_eager):
        gradient = torch.empty_like(prediction)
        results.append((serve(operands, gradient), gradient))
    for name, got, expected in zip(("losses", "gradient"), *results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


register("diffusion_loss", _self_test)
