"""A plan compared with reality: the memory of three real steps."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import values_of
from lowmem_db.engine.build import build_ema, build_step, set_arithmetic
from lowmem_db.engine.step import train_step
from lowmem_db.environment import GIB
from lowmem_db.models.finding import model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.output import as_json
from lowmem_db.planning.phases import training_batches, weights_of
from lowmem_db.planning.plan import Plan
from lowmem_db.planning.tracker import AllocationTracker
from lowmem_db.storage.run_folder import RunFolder, read_json, write_json

PLAN_FILE = "plan.json"
_NUM_STEPS = 3


@dataclass(frozen=True)
class Verified:
    """A prediction and a measurement: bytes of tensors at the peak of training."""

    predicted_bytes: int
    measured_bytes: int

    def as_json(self) -> dict[str, int]:
        """Return both under their names in ``plan.json``."""
        return {"predicted_train_bytes": self.predicted_bytes, "measured_train_bytes": self.measured_bytes}

    def describe(self) -> str:
        """Return both in words, and how far apart they are."""
        error = self.predicted_bytes / self.measured_bytes - 1.0
        return (
            f"train: predicted {self.predicted_bytes / GIB:.3f} GiB, measured {self.measured_bytes / GIB:.3f} GiB of "
            f"tensors in {_NUM_STEPS} real steps ({error:+.1%})"
        )


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes at the peak of training, counted at three places.

    Attributes:
        tensor_bytes: Of tensors.
        reserved_bytes: That the caching allocator took from the driver; None: the device has none.
        process_bytes: That ``nvidia-smi`` shows as used, other programs included; None: not a CUDA device.
    """

    tensor_bytes: int
    reserved_bytes: int | None = None
    process_bytes: int | None = None


def verify(plan: Plan) -> Verified:
    """Run three real training steps of a plan.

    Raises:
        ModelError: The model's weights are missing.
    """
    predicted = next(phase.parts.total for phase in plan.phases if phase.name == "train")
    device = environment.resolve_device(plan.config.device)
    model = model_of(plan.config)
    return Verified(predicted, measure_train(plan.config, model, device).tensor_bytes)


def measure_train(
    config: Config,
    model: ModelFolder,
    device: torch.device,
    *,
    num_steps: int = _NUM_STEPS,
    around_steps: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> MeasuredMemory:
    """Run real training steps on dummy latents, with the arithmetic of a run; return the peak memory they needed.

    On a CUDA device the allocator counts; on the CPU, storages are tracked as in a trace, but with real tensors.

    Args:
        config: The resolved configuration.
        model: The model, with its weights.
        device: The device to run on.
        num_steps: Number of steps.
        around_steps: Returns a context for the steps, entered after everything is built.
    """
    set_arithmetic(config, device)
    if device.type != "cuda":
        return MeasuredMemory(_follow(config, model, device, num_steps))
    denoiser, objective, optimizer = build_step(config, model, device)
    ema = build_ema(config, denoiser, optimizer)
    optimizer.set_learning_rates(dict.fromkeys(denoiser.modules(), 1e-6))
    environment.release_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    with around_steps():
        for step in range(num_steps):
            train_step(denoiser, objective, optimizer, training_batches(config, model, denoiser), step)
            if ema is not None:
                ema.update(step + 1)
    free, total = torch.cuda.mem_get_info(device)
    return MeasuredMemory(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), total - free)


def _follow(config: Config, model: ModelFolder, device: torch.device, num_steps: int) -> int:
    tracker = AllocationTracker(device_type=device.type, rounding=1, cpu_kernels=True)
    with tracker.tracking():
        denoiser, objective, optimizer = build_step(config, model, device)
        tracker.register(weights_of(denoiser.modules().values()), "weights")
        ema = build_ema(config, denoiser, optimizer)
        optimizer.set_learning_rates(dict.fromkeys(denoiser.modules(), 1e-6))
        batches = training_batches(config, model, denoiser)
        tracker.reset_peak()
        for step in range(num_steps):
            train_step(denoiser, objective, optimizer, batches, step)
            if ema is not None:
                ema.update(step + 1)
    return tracker.peak.total


def write_plan(run: RunFolder, plan: Plan, chosen: Collection[str] = ()) -> None:
    """Write ``plan.json`` of a run folder.

    Args:
        run: The run folder.
        plan: The plan.
        chosen: Paths of the fields that the configuration left open, so that the planner chose them.

    Raises:
        StorageError: The disk is full.
    """
    write_json(run.root / PLAN_FILE, as_json(plan) | {"chosen": sorted(chosen)})


def read_chosen(run: RunFolder) -> frozenset[str]:
    """Return the paths of the fields that the planner chose for a run; none if it does not say."""
    found: Any = read_json(run.root / PLAN_FILE)
    chosen = found.get("chosen") if isinstance(found, Mapping) else None
    return frozenset(filter(lambda path: isinstance(path, str), chosen if isinstance(chosen, list) else []))


def write_stepped_down(run: RunFolder, *, step: int, reason: str, strategy: Config) -> None:
    """Add a strategy to ``plan.json`` that a run continues with because it was out of memory.

    Args:
        run: The run folder.
        step: Optimizer steps done.
        reason: What ran out of memory.
        strategy: The strategy, as a resolved configuration.

    Raises:
        StorageError: The disk is full.
    """
    found: Any = read_json(run.root / PLAN_FILE)
    before = found.get("stepped_down", []) if isinstance(found, Mapping) else []
    added = {"step": step, "reason": reason, "strategy": values_of(strategy)}
    _add_to_plan(run, {"stepped_down": [*before, added]})


def write_measured(run: RunFolder, measured_bytes: int) -> None:
    """Add the measured peak of training to the prediction in ``plan.json``.

    Args:
        run: The run folder; nothing is written if it holds no plan.
        measured_bytes: Bytes of tensors at the peak, as counted by the device's allocator.

    Raises:
        StorageError: The disk is full.
    """
    _add_to_plan(run, {"measured_train_bytes": measured_bytes})


def write_trained(run: RunFolder, counts: Mapping[str, int]) -> None:
    """Add the number of trained parameters to ``plan.json``, per component and in total.

    Raises:
        StorageError: The disk is full.
    """
    _add_to_plan(run, {"trained_parameters": {**counts, "total": sum(counts.values())}})


def _add_to_plan(run: RunFolder, values: Mapping[str, Any]) -> None:
    found: Any = read_json(run.root / PLAN_FILE)
    if isinstance(found, Mapping):
        write_json(run.root / PLAN_FILE, {**found, **values})
