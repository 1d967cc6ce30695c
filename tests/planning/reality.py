"""An independent witness of the bytes a real step on the CPU allocates: the profiler of torch."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile

from lowmem_db.config.schema import Config
from lowmem_db.engine.build import build_ema, build_step
from lowmem_db.engine.step import train_step
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.phases import training_batches

CPU = torch.device("cpu")


def storages_alive() -> dict[int, int]:
    """Return the bytes of every storage that a tensor of this process has."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device.type == "cpu"]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def profiled_train_peak(config: Config, model: ModelFolder) -> int:
    """Return the peak of the second of two real steps: what was there before it, and the allocations in it."""
    before = storages_alive()
    denoiser, objective, optimizer = build_step(config, model, CPU)
    ema = build_ema(config, denoiser, optimizer)
    optimizer.set_learning_rates(dict.fromkeys(denoiser.modules(), 1e-6))
    batches = training_batches(config, model, denoiser)
    inputs = {batches[0].latent_mean.untyped_storage()._cdata, batches[0].latent_std.untyped_storage()._cdata}

    def step(number: int) -> None:
        train_step(denoiser, objective, optimizer, batches, number)
        if ema is not None:
            ema.update(number + 1)

    step(0)
    own = {key: size for key, size in storages_alive().items() if key not in before and key not in inputs}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(1)
    allocated = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return sum(own.values()) + peak
