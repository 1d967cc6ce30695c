"""What a training step costs beside the bare forward and backward pass, at Stable Diffusion 1.5's size on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/speed/step_overhead.py --output benchmarks/results/step_overhead.json

One process, random weights, UNet and text encoder in fp32 at 256 px, one photo and one class image, checkpointed
segments, 8-bit AdamW in the backward pass. Three things are timed in turn, round after round:

* `bare`: forward and backward of the same modules with the same checkpoints on ready inputs, each gradient freed when
  it is complete;
* `without_optimizer`: the training step, batch to reported losses, with an optimizer that does nothing;
* `step`: the training step.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.memory.sd15_step import write_random_model  # noqa: E402
from lowmem_db import environment  # noqa: E402
from lowmem_db.config.loading import load_config  # noqa: E402
from lowmem_db.config.strategy import resolve  # noqa: E402
from lowmem_db.engine.build import build_step  # noqa: E402
from lowmem_db.engine.step import train_step  # noqa: E402
from lowmem_db.models.denoiser import Denoiser  # noqa: E402
from lowmem_db.models.finding import find_model  # noqa: E402
from lowmem_db.models.folder import ModelFolder  # noqa: E402
from lowmem_db.optimizers.rules import StepScalars  # noqa: E402
from lowmem_db.records import Batch, Conditioning  # noqa: E402

RESOLUTION = 256


class NoRule:
    """An optimizer that leaves everything as it is."""

    reports_norm = True

    def state_tensors(self, parameter: Tensor, *, small: bool) -> list:
        """Return no state."""
        return []

    def step(self, parameter: Tensor, gradient: Tensor, state: Any, scalars: StepScalars, **_: Any) -> Tensor:
        """Do nothing."""
        return torch.zeros(())


def make_batch(model: ModelFolder, resolution: int) -> Batch:
    """Return a photo and a class image as they come from the caches."""
    space = model.space
    latents = torch.randn(2, space.channels, resolution // space.cell, resolution // space.cell)
    return Batch(
        latent_mean=latents,
        latent_std=torch.full_like(latents, 0.1),
        conditioning=Conditioning(tokens=model.family.blank_tokens(model, 2)),
        sample_ids=torch.arange(2),
        num_instance=1,
        sources=("photo", "class image"),
    )


def bare_pass(denoiser: Denoiser, batch: Batch) -> Callable[[], None]:
    """Return the forward and backward pass of the modules alone."""
    device = denoiser.device
    latents, timesteps = torch.randn_like(batch.latent_mean, device=device), torch.tensor([100, 700], device=device)
    tokens = batch.conditioning.tokens["input_ids"].to(device)

    def run() -> None:
        embeds = denoiser.text_encoders()["text_encoder"](tokens)[0]
        prediction = denoiser.module(latents, timesteps, encoder_hidden_states=embeds).sample
        prediction.square().mean().backward()

    return run


def free_gradients(modules: dict[str, nn.Module]) -> Callable[[], None]:
    """Free each gradient when it is complete; return what ends that."""

    def free(parameter: nn.Parameter) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(free) for m in modules.values() for p in m.parameters()]
    return lambda: [hook.remove() for hook in hooks] and None


def measure(base: str, resolution: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Time the three things in turn."""
    fields = {
        "model.base": base, "subject.instance_dir": "photos", "subject.instance_prompt": "a sks dog",
        "subject.class_prompt": "a dog", "output_dir": "run", "data.resolution": resolution,
        "training.train_text_encoder": True, "optimizer.name": "adamw8bit", "memory.weights": "fp32",
        "memory.optimizer_in_backward": True, "memory.checkpointing": "segments",
    }  # fmt: skip
    config, model = load_config(None, list(fields.items())), find_model(base)
    denoiser, objective, optimizer = build_step(resolve(config), model, device)
    optimizer.set_learning_rates(dict.fromkeys(optimizer.group_names(), 2e-6))
    batch, rule = make_batch(model, resolution), optimizer.rule
    bare = bare_pass(denoiser, batch)
    seconds: dict[str, list[float]] = {"bare": [], "without_optimizer": [], "step": []}
    for step in range(rounds + 1):  # the first round warms up
        optimizer.undo()
        end = free_gradients(dict(denoiser.modules()))
        times = {"bare": timed(bare)}
        end()
        optimizer.apply()
        optimizer.rule = NoRule()
        times["without_optimizer"] = timed(partial(train_step, denoiser, objective, optimizer, [batch], step))
        optimizer.rule = rule
        times["step"] = timed(partial(train_step, denoiser, objective, optimizer, [batch], step))
        print(step, times, file=sys.stderr, flush=True)
        for name, value in times.items():
            seconds[name] += [value] if step else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: [one / bare for one, bare in zip(values, seconds["bare"], strict=True)]
        for name, values in seconds.items()
    }
    return {
        "benchmark": "step_overhead",
        "seconds": seconds,
        "median_seconds": medians,
        "median_ratio_to_bare": {name: statistics.median(values) for name, values in ratios.items()},
        "num_threads": torch.get_num_threads(),
        "versions": environment.versions(),
    }


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of a call, until the device is done."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure, print a JSON line and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="with the small model of this package, to try the script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if options.tiny:
            result = measure("demo", 128, options.device, options.rounds)
        else:
            write_random_model(Path(work))
            result = measure(work, RESOLUTION, options.device, options.rounds)
    print(json.dumps(result))
    for name, seconds in result["median_seconds"].items():
        print(f"{name:18} {seconds:6.1f} s  {result['median_ratio_to_bare'][name]:5.3f} x bare")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
