"""Write ``plans.json``: what ``lowmem-db plan`` says of every file in ``configs/``, on the card it was made for.

``python -m tests.before.make_plans`` from the repository's root. The table was written by the code of commit 3706736;
where a plan is meant to change, the table changes with it in the same commit. Once it did so late: since 21995ed a step
reads once from the device, for which one more tensor of 512 bytes lives through the backward pass. Configurations that
came later stand in it as they were first planned, and the demo with its new batch size.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TABLE = Path(__file__).with_name("plans.json")
KEPT = ("peak_bytes", "allowance_bytes", "budget_bytes", "strategy", "seconds_per_step")


def target_of(file: Path) -> list[str]:
    """Return the options that name the card in a file's header; the demo is for a CPU and 2 GiB."""
    if file.stem == "demo":
        return ["device=cpu", "--budget", "2GiB"]
    if file.stem.endswith("t4"):
        return ["--gpu", "T4"]
    size = re.search(r"(\d+)gb", file.stem)
    return ["--gpu", "rtx 3060" if size is None else f"rtx 3060 {size[1]}GB"]


def plan(file: Path) -> dict[str, Any]:
    """Return the plan of a file, made in a process of its own with one thread."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lowmem_db", "plan", str(file.relative_to(ROOT)), "--json", *target_of(file)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    phases = {phase["name"]: {**phase["parts"], "host_bytes": phase["host_bytes"]} for phase in found["phases"]}
    return {name: found[name] for name in KEPT} | {"phases": phases}


if __name__ == "__main__":
    table = {file.stem: plan(file) for file in sorted(CONFIGS.glob("*.yaml"))}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
