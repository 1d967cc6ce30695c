"""A long run of the demo base with checkpoints, samples, scores and curves: does anything grow?

    python -m tools.torture.long_run --steps 20000 --output benchmarks/results/torture/long_run.json

Every step notes resident memory, open files and seconds; every checkpoint the size of the run folder. Slopes are those
of least squares over means of blocks of steps, with intervals of 95 %; the first fifth, while caches fill, is left out.
Whether steps become slower is judged by the fastest one of each block, because what else the machine does only adds.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_db import api
from lowmem_db.training.observers import Observer, Training

_BLOCK = 25
_WARM_UP = 0.2
_FEWEST_STEPS = 200
_STUDENT_95 = {5: 2.57, 10: 2.23, 20: 2.09, 40: 2.02}  # by degrees of freedom
_BASE = Path(__file__).parents[2]


class Watch(Observer):
    """Notes what a run uses after every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.folder_bytes: list[tuple[int, Counter[str]]] = []

    def start(self, trainer: Training) -> None:
        """Remember the run."""
        self._root = trainer.run.root
        self._processor_seconds = time.process_time()

    def step(self, row: Mapping[str, Any]) -> None:
        """Note memory, files and seconds."""
        before, self._processor_seconds = self._processor_seconds, time.process_time()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rows.append({
            "step": row["step"],
            "resident_mib": pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20),
            "open_files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "seconds": row["seconds"],
            "processor_seconds": self._processor_seconds - before,
        })  # fmt: skip

    def checkpoint(self, step: int) -> None:
        """Note the size of each part of the run folder."""
        sizes: Counter[str] = Counter()
        for file in self._root.rglob("*"):
            if file.is_file():
                sizes[file.relative_to(self._root).parts[0]] += file.stat().st_size
        self.folder_bytes.append((step, sizes))


def slope(steps: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Return the slope of values per 1000 steps by least squares, and half the width of its 95 % interval."""
    count = len(steps)
    mean_step, mean = sum(steps) / count, sum(values) / count
    spread = sum((step - mean_step) ** 2 for step in steps)
    gradient = sum((step - mean_step) * (value - mean) for step, value in zip(steps, values, strict=True)) / spread
    errors = [value - mean - gradient * (step - mean_step) for step, value in zip(steps, values, strict=True)]
    freedom = count - 2
    student = next((factor for most, factor in _STUDENT_95.items() if freedom <= most), 1.98)
    half = student * math.sqrt(sum(error**2 for error in errors) / freedom / spread)
    return {"mean": mean, "per_1000_steps": 1000 * gradient, "plus_minus": 1000 * half, "blocks": count}


def slopes(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the slopes of what was noted."""
    rows = rows[int(len(rows) * _WARM_UP) :]
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows) - _BLOCK + 1, _BLOCK)]
    means = [{name: sum(row[name] for row in block) / _BLOCK for name in rows[0]} for block in blocks]
    for mean, block in zip(means, blocks, strict=True):
        mean["fastest_seconds"] = min(row["processor_seconds"] for row in block)
    steps = [mean["step"] for mean in means]
    return {name: slope(steps, [mean[name] for mean in means]) for name in means[0] if name != "step"}


def long_run(folder: Path, num_steps: int) -> dict[str, Any]:
    """Train the demo base in a folder; return the slopes."""
    every = max(50, num_steps // 40)
    config = api.load_config(_BASE / "configs" / "demo.yaml", {
        "subject.instance_dir": str(_BASE / "examples" / "dog3"), "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"), "device": "cpu", "data.resolution": 64,
        "prior.num_class_images": 6, "prior.class_prompts": [],
        "prior.num_inference_steps": 4, "training.max_train_steps": num_steps, "training.train_batch_size": 1,
        "checkpointing.every": every, "sampling.num_images": 1, "sampling.num_inference_steps": 4,
        "evaluation.every": 2 * every, "logging.tensorboard": True,
    })  # fmt: skip
    watch = Watch()
    api.train(config, observers=[watch])
    found: dict[str, Any] = slopes(watch.rows)
    (first, before), (last, after) = watch.folder_bytes[2], watch.folder_bytes[-1]  # both hold checkpointing.keep
    return {
        "steps": len(watch.rows),
        "checkpoints": len(watch.folder_bytes),
        **found,
        "folder_bytes": dict(after),
        "folder_bytes_per_1000_steps": {name: 1000 * (after[name] - before[name]) / (last - first) for name in after},
        "grows": growing(found, len(watch.rows)),
    }


def growing(found: Mapping[str, Mapping[str, float]], num_steps: int) -> list[str]:
    """Return what surely grew over the run by more than it may: 50 MiB, one open file, a fifth of a step's time."""
    may = {"resident_mib": 50.0, "open_files": 1.0, "fastest_seconds": 0.2 * found["fastest_seconds"]["mean"]}
    surely = {name: (found[name]["per_1000_steps"] - found[name]["plus_minus"]) * num_steps / 1000 for name in may}
    return [name for name in may if surely[name] > may[name]]


def main() -> int:
    """Run, and write the slopes; the exit code is 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/torture/long_run.json"))
    parser.add_argument("--version", default=None, help="commit, noted in the result")
    options = parser.parse_args()
    if options.steps < _FEWEST_STEPS:
        parser.error(f"--steps: {options.steps}; allowed: at least {_FEWEST_STEPS}, for four checkpoints")
    with tempfile.TemporaryDirectory() as folder:
        found = {"part": "long_run", "version": options.version} | long_run(Path(folder), options.steps)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    return int(bool(found["grows"]))


if __name__ == "__main__":
    sys.exit(main())
