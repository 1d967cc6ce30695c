"""One training step on one screen."""

import math
from collections.abc import Sequence

from lowmem_db_kernels import DiffusionLoss

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
        batches: The batches whose gradients are averaged.
        step: Number of optimizer steps before this one; every random draw depends on it.

    Raises:
        NonFiniteError: The loss or the gradient is infinite or NaN.
    """
    optimizer.zero_grad()
    losses: list[DiffusionLoss] = []
    for batch in batches:
        noised = objective.noise(batch, step)
        prediction = denoiser.predict(noised.noisy_latents, noised.timesteps, batch.conditioning)
        loss = objective.loss(prediction, noised)
        _refuse_non_finite_loss(loss, batch)
        optimizer.backward(loss.total / len(batches))
        losses.append(loss)
    gradient_norm = optimizer.step()
    return _report(losses, has_prior=batches[0].num_instance < len(batches[0].sources), gradient_norm=gradient_norm)


def _refuse_non_finite_loss(loss: DiffusionLoss, batch: Batch) -> None:
    if loss.finite:
        return
    bad = [
        name for name, value in zip(batch.sources, loss.per_sample.tolist(), strict=True) if not math.isfinite(value)
    ]
    raise NonFiniteError(f"the loss of {', '.join(bad)} is not finite; the weights were not changed")


def _report(losses: Sequence[DiffusionLoss], *, has_prior: bool, gradient_norm: float) -> StepOutput:
    def mean(name: str) -> float:
        return sum(getattr(loss, name).item() for loss in losses) / len(losses)

    return StepOutput(
        loss=mean("total"),
        loss_instance=mean("instance"),
        loss_prior=mean("prior") if has_prior else None,
        grad_norm=gradient_norm if math.isfinite(gradient_norm) else None,
    )
