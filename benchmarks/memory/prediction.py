"""The planner against real steps at Stable Diffusion 1.5's size on the CPU: bytes of tensors at the peak of training.

    python benchmarks/memory/prediction.py [--device cuda] [--tiny] [--only STRATEGY]
        [--output benchmarks/results/prediction_sd15.jsonl]

UNet and text encoder in fp32 with random weights, one photo and one class image at 256 px, 8-bit AdamW in the backward
pass. Each strategy is predicted from configuration files, then followed with real tensors, then seen by torch's
profiler, which knows nothing of the planner. Prints a JSON line per strategy, then a table. The part of the host is in
`host_bytes`; on a CPU, where host and device are the same memory, the process needs both (`process_bytes`, on Linux).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.memory.sd15_step import GIB, write_random_model  # noqa: E402
from lowmem_db.config.loading import load_config  # noqa: E402
from lowmem_db.config.strategy import resolve  # noqa: E402
from lowmem_db.environment import release_host_memory  # noqa: E402
from lowmem_db.models.finding import find_model  # noqa: E402
from lowmem_db.models.folder import ModelFolder  # noqa: E402
from lowmem_db.planning.cards import CPU  # noqa: E402
from lowmem_db.planning.measured import measure_train  # noqa: E402
from lowmem_db.planning.phases import TracedRun, trace_train  # noqa: E402
from lowmem_db.planning.target import target_of_device  # noqa: E402
from tests.planning.reality import profiled_train_peak  # noqa: E402

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STRATEGIES: dict[str, dict[str, Any]] = {
    "no checkpointing": {"memory.checkpointing": "none"},
    "segments": {"memory.checkpointing": "segments"},
    "segments, streamed states": {"memory.checkpointing": "segments", "memory.stream_optimizer_state": True},
    "segments, streamed states and weights": {
        "memory.checkpointing": "segments",
        "memory.stream_optimizer_state": True,
        "memory.stream_weights": True,
    },
}


def compare(model: ModelFolder, fields: dict[str, Any], device: torch.device, resolution: int) -> dict[str, int]:
    """Return the bytes that were predicted, followed and profiled; the host's are part of all three on the CPU.

    A CUDA device's allocator counts there, and the profiler is left out.
    """
    needed = {
        "model.base": str(model.path), "subject.instance_dir": "photos", "subject.instance_prompt": "a sks dog",
        "subject.class_prompt": "a dog", "output_dir": "run", "data.resolution": resolution,
        "training.train_text_encoder": True, "optimizer.name": "adamw8bit", "memory.optimizer_in_backward": True,
    }  # fmt: skip
    config = resolve(load_config(None, list((needed | fields).items())))
    if device.type == "cuda":
        traced = trace_train(TracedRun(config=config, model=model, card=target_of_device(config, device).card))
        measured = measure_train(config, model, device, num_steps=1).tensor_bytes
        return {"predicted_bytes": traced.peak.total, "followed_bytes": measured, "profiled_bytes": measured}
    traced = trace_train(TracedRun(config=config, model=model, card=CPU))
    followed = measure_train(config, model, device, num_steps=1).tensor_bytes
    release_host_memory()
    _forget_process_peak()
    return {
        "predicted_bytes": traced.peak.total + traced.host_bytes,
        "followed_bytes": followed + traced.host_bytes,
        "profiled_bytes": profiled_train_peak(config, model),
        "host_bytes": traced.host_bytes,
        "process_bytes": _process_peak(),
    }


def _forget_process_peak() -> None:
    if _STATUS.is_file():
        _CLEAR.write_text("5")  # proc(5): resets VmHWM


def _process_peak() -> int:
    """Return the most memory that the process had since then; 0 where the system does not tell."""
    lines = _STATUS.read_text().splitlines() if _STATUS.is_file() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    """Compare, print JSON lines and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=STRATEGIES, help="this one, beside those in the output")
    parser.add_argument("--tiny", action="store_true", help="with the small model of this package, to try the script")
    options = parser.parse_args()
    rows, device = [], torch.device(options.device)
    with tempfile.TemporaryDirectory() as work:
        if not options.tiny:
            write_random_model(Path(work) / "model")
        model = find_model("demo" if options.tiny else str(Path(work) / "model"))
        for name in [options.only] if options.only else STRATEGIES:
            fields = STRATEGIES[name]
            rows.append({"strategy": name, **compare(model, fields, device, 128 if options.tiny else 256)})
            print(json.dumps(rows[-1]), flush=True)
    print("| strategy | predicted | followed | profiler | error |")
    print("|---|---|---|---|---|")
    for row in rows:
        predicted, followed, profiled = (row[f"{kind}_bytes"] for kind in ("predicted", "followed", "profiled"))
        sizes = " | ".join(f"{size / GIB:.3f} GiB" for size in (predicted, followed, profiled))
        print(f"| {row['strategy']} | {sizes} | {predicted / profiled - 1:+.2%} |")
    if options.output:
        before = options.output.read_text().splitlines() if options.only and options.output.is_file() else []
        kept = [row for row in map(json.loads, before) if row["strategy"] != options.only]
        rows = [*kept, *rows]
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
