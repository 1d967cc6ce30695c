"""One LoRA step of a model of Stable Diffusion XL's size with random weights, on the CPU: peak memory and time.

    python benchmarks/memory/sdxl_lora_step.py [--output benchmarks/results/sdxl_lora_step.json] [section.key=value ...]

The UNet is built from the configuration in this package, 2.57 billion fp32 weights, and gets adapters of rank 16 beside
its attention. One step with prior preservation at 256 px is done in a process of its own: the same code as in training,
with text embeddings and latent moments as they come from the caches, and without autoencoder and text encoders. The
peak is that of the whole process (VmHWM); beside it stands what the planner predicts for the tensors of the step.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_db import environment
from lowmem_db.adaptation.layers import count_trained
from lowmem_db.config.flags import parse_arguments
from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import resolve
from lowmem_db.engine import build
from lowmem_db.engine.step import train_step
from lowmem_db.models.finding import model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.phases import TracedRun, trace_train, training_batches
from lowmem_db.planning.target import target_of_device

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
FIELDS = (
    "model.base=stabilityai/stable-diffusion-xl-base-1.0", "subject.instance_dir=photos", "output_dir=run",
    "subject.instance_prompt=a photo of sks dog", "subject.class_prompt=a photo of dog", "device=cpu",
    "data.resolution=256", "lora.enabled=true", "memory.checkpointing=segments",
)  # fmt: skip
TINY = ("model.base=demo", "data.resolution=128")


def measure_step(*overrides: str) -> dict[str, Any]:
    """Do the step in a process of its own; return its peak, its time and its loss."""
    command = [sys.executable, "-m", "benchmarks.memory.sdxl_lora_step", "--here", *overrides]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _step_here(overrides: list[str]) -> dict[str, Any]:
    config = resolve(load_config(None, parse_arguments([*FIELDS, *overrides]).overrides))
    model, device = model_of(config, weights=False), torch.device(config.device)
    card = target_of_device(config, device).card
    predicted = trace_train(TracedRun(config=config, model=model, card=card)).peak.total
    load = ModelFolder.load

    def load_random(model: ModelFolder, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return _with_random_weights(load(model, name, torch.device("meta"), dtype))

    ModelFolder.load = load_random  # type: ignore[method-assign]
    denoiser, objective, optimizer = build.build_step(config, model, device)
    optimizer.set_learning_rates(dict.fromkeys(denoiser.modules(), 1e-4))
    started = time.perf_counter()
    output = train_step(denoiser, objective, optimizer, training_batches(config, model, denoiser), 0)
    seconds = time.perf_counter() - started
    return {
        "benchmark": "sdxl_lora_step",
        "fields": [*FIELDS, *overrides],
        "process_peak_bytes": _peak_bytes(),
        "predicted_train_bytes": predicted,
        "parameters": sum(parameter.numel() for parameter in denoiser.module.parameters()),
        "trained_parameters": count_trained(denoiser.modules()),
        "loss": output.loss,
        "grad_norm": output.grad_norm,
        "step_seconds": round(seconds, 1),
        "num_threads": torch.get_num_threads(),
        "versions": environment.versions(),
    }


def _with_random_weights(module: nn.Module) -> nn.Module:
    """Return a module that was built on the meta device, with weights of a usual size: one tensor at a time."""
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(float(name.endswith("weight")))
    return module


def _peak_bytes() -> int:
    """Return the most resident memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Measure, print a JSON line and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--here", action="store_true", help="in this process, without the table")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="with the small model of this package, to try the script")
    options, overrides = parser.parse_known_args()
    overrides = [f"device={options.device}", *(TINY if options.tiny else ()), *overrides]
    if options.here:
        print(json.dumps(_step_here(overrides)))
        return
    result = measure_step(*overrides)
    print(json.dumps(result))
    print(f"peak of the process   {result['process_peak_bytes'] / GIB:6.2f} GiB")
    print(f"predicted for tensors {result['predicted_train_bytes'] / GIB:6.2f} GiB")
    print(f"step                  {result['step_seconds']:6.1f} s on {result['num_threads']} threads")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
