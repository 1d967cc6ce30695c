"""What one optimizer hook costs on the CPU side, through torch's custom operator and around it.

    OMP_NUM_THREADS=1 python benchmarks/speed/hook_overhead.py --output benchmarks/results/hook_overhead.json

A large parameter of 4,096 elements, the smallest there is, so that its arithmetic hardly counts, is stepped as in the
backward pass. Both ways and a plain ``x.add_(1)`` run in turn, many times; what is reported is the median of the
processor time in units of that addition, with the step itself and with a step that does nothing in its place.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lowmem_db import environment  # noqa: E402
from lowmem_db.config.loading import load_config  # noqa: E402
from lowmem_db.config.strategy import resolve  # noqa: E402
from lowmem_db.optimizers.build import build_optimizer  # noqa: E402

STEP = "lowmem_db_kernels.adamw8bit_step"


def hook_of(clipping: str, device: torch.device) -> Callable[[], None]:
    """Return the step of one parameter as the hook takes it."""
    module = torch.nn.Linear(64, 64, bias=False, device=device)
    fields = {
        "model.base": "demo", "subject.instance_dir": "photos", "subject.instance_prompt": "a sks dog",
        "subject.class_prompt": "a dog", "output_dir": "run", "optimizer.name": "adamw8bit", "memory.weights": "fp32",
        "memory.optimizer_in_backward": True, "training.clipping": clipping,
    }  # fmt: skip
    config = load_config(None, list(fields.items()))
    optimizer: Any = build_optimizer(resolve(config), {"unet": module}, device)
    optimizer.set_learning_rates({"unet": 1e-6})
    optimizer._begin_step()
    gradient = torch.full_like(module.weight, 1e-3)

    def hook() -> None:
        module.weight.grad = gradient
        optimizer._on_gradient(optimizer.units[0])
        optimizer._squared_norms.clear()

    return hook


def microseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Return the processor time of one call, a mean over some; other work on the machine is not measured with it."""
    started = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - started) / repeats * 1e6


def measure(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time every way in turn."""
    x, sums = torch.ones(4096, device=device), torch.ones(2, device=device)
    rows = []
    for clipping in ("lagged", "update_rms"):
        for stubbed in (False, True):
            hook = hook_of(clipping, device)
            times: dict[str, list[float]] = {"add": [], "operator": [], "direct": []}
            for _ in range(rounds):
                times["add"].append(microseconds(lambda: x.add_(1)))
                for way in ("operator", "direct"):
                    with patch(f"{STEP}.runs_plainly", lambda _, way=way: way == "direct"):
                        if stubbed:
                            with patch(f"{STEP}._server", lambda *_: lambda _: sums.clone()):
                                times[way].append(microseconds(hook))
                        else:
                            times[way].append(microseconds(hook))
            medians = {name: statistics.median(values) for name, values in times.items()}
            rows.append(
                {
                    "clipping": clipping,
                    "step": "does nothing" if stubbed else "as it is",
                    "adds_through_operator": round(medians["operator"] / medians["add"], 1),
                    "adds_directly": round(medians["direct"] / medians["add"], 1),
                    "ratio": round(medians["direct"] / medians["operator"], 3),
                    "microseconds_of_an_add": round(medians["add"], 2),
                }
            )
    return rows


def main() -> None:
    """Measure, print a JSON line and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="two rounds, to try the script")
    options = parser.parse_args()
    rows = measure(2 if options.tiny else options.rounds, options.device)
    result = {
        "benchmark": "hook_overhead",
        "rows": rows,
        "num_threads": torch.get_num_threads(),
        "versions": environment.versions(),
    }
    print(json.dumps(result))
    for row in rows:
        print(
            f"{row['clipping']:10} step {row['step']:12} operator {row['adds_through_operator']:6.1f} adds, "
            f"directly {row['adds_directly']:6.1f}, ratio {row['ratio']:.2f}"
        )
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
