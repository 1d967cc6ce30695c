"""One training step on one screen."""

import itertools
import math
from collections.abc import Sequence

import torch
from lowmem_db_kernels import DiffusionLoss

from lowmem_db.distributed.world import World
from lowmem_db.errors import NonFiniteError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.objective.objective import Objective
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.records import Batch, StepOutput


def train_step(
    denoiser: Denoiser, objective: Objective, optimizer: OptimizerHandle, batches: Sequence[Batch], step: int
) -> StepOutput:
    """Do one optimizer step on Equation 2 of arXiv:2208.12242.

    Args:
        denoiser: The model, with the optimizer's parameters.
        objective: Draws noise and timesteps, and computes the loss.
        optimizer: The optimizer, with its learning rates set.
        batches: This process's batches; the gradients of all processes are averaged.
        step: Number of optimizer steps before this one; every random draw depends on it.

    Raises:
        NonFiniteError: The loss or the gradient is infinite or NaN.
    """
    world = optimizer.reduction.world
    optimizer.zero_grad()
    losses: list[DiffusionLoss] = []
    for batch in batches:
        noised = objective.noise(batch, step)
        conditioning = objective.conditioning(batch, step)
        prediction = denoiser.predict(noised.noisy_latents, noised.timesteps, conditioning)
        loss = objective.loss(prediction, noised)
        if not optimizer.withstands_non_finite_loss:
            _refuse_non_finite([optimizer.read(loss.packed)], [batch], world)
        optimizer.backward(loss.total / (len(batches) * world.size), finite=loss.finite)
        losses.append(loss)
    packed = torch.cat([loss.packed for loss in losses])
    try:
        gradient_norm, values = optimizer.step_and_read(packed)
    except NonFiniteError:
        _refuse_non_finite(_rows(packed.tolist(), losses), batches, world)
        raise
    rows = _refuse_non_finite(_rows(values, losses), batches, world)
    has_prior = batches[0].num_instance < len(batches[0].sources)
    return _report(rows, has_prior=has_prior, gradient_norm=gradient_norm, num_processes=world.size)


def _rows(values: Sequence[float], losses: Sequence[DiffusionLoss]) -> list[Sequence[float]]:
    """Return what each batch's loss packs: total, instance, prior, finite, and the loss of each sample."""
    stops = list(itertools.accumulate(len(loss.packed) for loss in losses))
    return [values[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def _refuse_non_finite(
    rows: Sequence[Sequence[float]], batches: Sequence[Batch], world: World
) -> list[Sequence[float]]:
    """Return the rows of all processes, in the order of their batches, unless one of them is not finite."""
    found = world.gathered_in_turn([(row, _not_finite(row, batch)) for row, batch in zip(rows, batches, strict=True)])
    for _, bad in found:
        if bad is not None:
            raise NonFiniteError(f"the loss of {', '.join(bad)} is not finite; the weights were not changed")
    return [row for row, _ in found]


def _not_finite(row: Sequence[float], batch: Batch) -> list[str] | None:
    """Return the samples whose loss is not finite, or None if the batch's loss is."""
    _, _, _, finite, *per_sample = row
    if finite:
        return None
    return [name for name, value in zip(batch.sources, per_sample, strict=True) if not math.isfinite(value)]


def _report(
    rows: Sequence[Sequence[float]], *, has_prior: bool, gradient_norm: float, num_processes: int
) -> StepOutput:
    """Return what is written about a step, from the rows of :func:`_rows`, which the processes take in turn."""
    total, instance, prior = (sum(row[part] for row in rows) / len(rows) for part in range(3))
    return StepOutput(
        loss=total,
        loss_instance=instance,
        loss_prior=prior if has_prior else None,
        grad_norm=gradient_norm if math.isfinite(gradient_norm) else None,
        num_samples=tuple(sum(len(row) - 4 for row in rows[rank::num_processes]) for rank in range(num_processes)),
    )
