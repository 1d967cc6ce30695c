"""How often clipping by the update's root mean square acts, and what a run is without it.

``OMP_NUM_THREADS=1 python benchmarks/clipping.py FOLDER [--steps 60] [--output benchmarks/results/clipping.json]``

The demo base learns the drawn dog of ``examples``: UNet and text encoder, 24-bit weights, 8-bit AdamW in the backward
pass, rate 1e-4, one picture a step, with the same noise in every run. Each way of clipping is a run in FOLDER.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
WAYS = ("update_rms", "lagged", "none")


def measured(way: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train, and return how often the updates of a tensor were scaled down, and the losses."""
    from torch import Tensor

    from lowmem_db import train
    from lowmem_db.config.loading import load_config
    from lowmem_db.optimizers import adamw8bit

    fields = {
        "model.base": "demo", "subject.instance_dir": str(ROOT / "examples" / "drawn_dog"),
        "subject.instance_prompt": "a drawing of a zx dog", "prior.enabled": False, "output_dir": str(folder / way),
        "optimizer.name": "adamw8bit", "memory.weights": "bf16_extra_bits", "memory.optimizer_in_backward": True,
        "memory.checkpointing": "none", "memory.stream_optimizer_state": False, "training.clipping": way,
        "training.max_train_steps": steps, "training.train_text_encoder": True, "training.learning_rate": 1e-4,
        "training.train_batch_size": 1, "training.mixed_precision": "bf16",
    }  # fmt: skip
    seen: list[float] = []
    step = adamw8bit.adamw8bit_step

    def noted(parameter: Tensor, *arguments: Any, **options: Any) -> Tensor:
        sums = step(parameter, *arguments, **options)
        if options.get("dry_run"):
            seen.append((sums[1] / parameter.numel()).sqrt().item())
        return sums

    with patch.object(adamw8bit, "adamw8bit_step", noted):
        train(load_config(None, list(fields.items())))
    rows = [json.loads(line) for line in (folder / way / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    found: dict[str, Any] = {"clipping": way, "steps": steps, "losses": losses}
    found["mean_loss_of_second_half"] = statistics.mean(losses[len(losses) // 2 :])
    if seen:
        found["share_scaled_down"] = sum(each > 1.0 for each in seen) / len(seen)
        found["share_scaled_down_after_a_fifth"] = sum(each > 1.0 for each in seen[len(seen) // 5 :]) / len(seen)
        found |= {"largest": max(seen), "median": statistics.median(seen)}
    return found


def main() -> None:
    """Train in each way, and print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = [measured(way, arguments.folder, arguments.steps) for way in (arguments.only and [arguments.only]) or WAYS]
    for each in found:
        print(json.dumps({name: value for name, value in each.items() if name != "losses"}))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
