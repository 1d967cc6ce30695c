"""Training steps of a model of Stable Diffusion 1.5's size with random weights, on the CPU: peak memory and time.

    python benchmarks/memory/sd15_step.py plain  [--output benchmarks/results/sd15_step.json]
    python benchmarks/memory/sd15_step.py engine [--output benchmarks/results/sd15_step_engine.json]

The model is built from the configuration in this package and written to a temporary folder (2.1 GB, fp16); then
`lowmem-db train` does its whole job on it in a process of its own, UNet and text encoder in fp32 with prior
preservation: class image, caches, steps, checkpoint, final model. The peak is that of the whole process.

`plain` is one step at 64 px with fp32 AdamW after the backward pass; compared with weights, gradients and AdamW states
in fp32, 16 bytes for each of 982.6 M parameters. `engine` is three steps at 256 px with 8-bit AdamW in the backward
pass and checkpointed segments.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lowmem_db import environment
from lowmem_db.models.saving import save_component

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "lowmem_db" / "models" / "configs" / "sd15"
GIB = 1 << 30
JOBS = {
    "plain": ("data.resolution=64", "training.max_train_steps=1", "memory.weights=fp32", "memory.checkpointing=none"),
    "engine": (
        "data.resolution=256", "training.max_train_steps=3", "memory.weights=fp32", "memory.checkpointing=segments",
        "optimizer.name=adamw8bit", "memory.optimizer_in_backward=true",
    ),
}  # fmt: skip


def write_random_model(folder: Path) -> None:
    """Write a model of Stable Diffusion 1.5's shapes with random weights in fp16."""
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        config = json.loads((CONFIGS / name / "config.json").read_text())
        save_component(folder / name, kind.from_config(config), dtype=torch.float16)
    text_config = CLIPTextConfig(**json.loads((CONFIGS / "text_encoder" / "config.json").read_text()))
    save_component(folder / "text_encoder", CLIPTextModel(text_config), dtype=torch.float16)
    shutil.copytree(CONFIGS / "scheduler", folder / "scheduler")
    shutil.copytree(ROOT / "tests" / "assets" / "sd15_tokenizer", folder / "tokenizer")
    shutil.copy(CONFIGS / "model_index.json", folder)


def measure_steps(work: Path, job: str, *overrides: str, tiny: bool = False) -> dict[str, Any]:
    """Train in a process of its own; return its peak resident memory, its times and its losses."""
    if tiny:
        overrides = ("model.base=demo", "data.resolution=128", "training.lr_warmup_steps=0", *overrides)
    else:
        write_random_model(work / "model")
    arguments = [
        f"model.base={work / 'model'}", f"subject.instance_dir={ROOT / 'examples' / 'dog3'}",
        "subject.instance_prompt=a photo of sks dog", "subject.class_prompt=a photo of dog",
        f"output_dir={work / 'run'}", f"cache_dir={work / 'cache'}", "device=cpu",
        "prior.num_class_images=1", "prior.num_inference_steps=1", "prior.sample_batch_size=1",
        "training.train_text_encoder=true", "logging.tensorboard=false", *JOBS[job], *overrides,
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lowmem_db", "train", *arguments], check=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "benchmark": f"sd15_step {job}",
        "overrides": [*JOBS[job], *overrides],
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "step_peak_bytes": rows[-1]["peak_bytes"],
        "step_seconds": [row["seconds"] for row in rows],
        "process_seconds": round(seconds, 1),
        "losses": [row["loss"] for row in rows],
        "grad_norms": [row["grad_norm"] for row in rows],
        "weights_gradients_states_bytes": 16 * (859_520_964 + 123_060_480),
        "num_threads": torch.get_num_threads(),
        "versions": environment.versions(),
    }


def main() -> None:
    """Measure, print a JSON line and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="with the small model of this package, to try the script")
    options, overrides = parser.parse_known_args()
    overrides = [f"device={options.device}", *overrides]
    with tempfile.TemporaryDirectory() as work:
        result = measure_steps(Path(work), options.job, *overrides, tiny=options.tiny)
    print(json.dumps(result))
    print(f"peak of the process          {result['process_peak_bytes'] / GIB:6.2f} GiB")
    print(f"peak up to the last step     {result['step_peak_bytes'] / GIB:6.2f} GiB")
    print(f"16 bytes for each parameter  {result['weights_gradients_states_bytes'] / GIB:6.2f} GiB")
    print(f"steps                        {', '.join(f'{seconds:.1f}' for seconds in result['step_seconds'])} s")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
