"""A whole command beside diffusers' script with the same flags: what is spent around the steps.

    git clone --depth 1 https://github.com/huggingface/diffusers
    OMP_NUM_THREADS=1 python benchmarks/speed/whole_command.py --diffusers diffusers --size sd15 \
        --output benchmarks/results/whole_command_sd15.json

Both train the UNet of one model with random weights, from start to final model, in processes of their own, in turn:
`small` is the model of the tests, `sd15` has Stable Diffusion 1.5's size (15 GB of memory). Each runs with one step and
with more; the difference is the cost of the steps, and what is left of the first is the cost around them. Reported are
processor time, time by the clock, the largest resident memory and the bytes given to `write`. This package always
leaves a last checkpoint that training can go on from; with `--resumable` the script writes its own as well.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = Path("examples/dreambooth/train_dreambooth.py")
CHILD = """
import json, resource, sys, time
from pathlib import Path
started = time.time()
sys.path.insert(0, {root!r})
if {who!r} == "script":
    import torch
    from benchmarks.parity.script import load_script
    script = load_script(Path({script!r}))
    script.main(script.parse_args({flags!r}))
else:
    from lowmem_db.cli.main import main
    sys.argv = ["lowmem-db", "train", "train_dreambooth.py", *{flags!r}, *{overrides!r}]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
used = resource.getrusage(resource.RUSAGE_SELF)
written = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"]
Path({report!r}).write_text(json.dumps({{
    "processor_seconds": used.ru_utime + used.ru_stime, "seconds": time.time() - started,
    "peak_bytes": used.ru_maxrss * 1024, "written_bytes": int(written),
}}))
"""
QUANTITIES = ("processor_seconds", "seconds")


def run(
    who: str, script: Path, model: Path, work: Path, resolution: int, steps: int, *, resumable: bool = False
) -> dict[str, float]:
    """Train in a process of its own; return what it reported.

    Args:
        who: ``lowmem-db`` or ``script``.
        script: The script of diffusers.
        model: Folder of the model.
        work: Folder for everything that is written.
        resolution: Of the pictures, pixels.
        steps: Optimizer steps.
        resumable: Let the script write a checkpoint at the last step, as this package always does.
    """
    flags = [
        f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={work / 'photos'}",
        "--instance_prompt=a zx dog", f"--output_dir={work / 'out'}", f"--resolution={resolution}",
        "--train_batch_size=1", f"--max_train_steps={steps}", "--learning_rate=1e-6", "--lr_scheduler=constant",
        "--mixed_precision=no", "--seed=1",
    ]  # fmt: skip
    if resumable and who == "script":
        flags.append(f"--checkpointing_steps={steps}")
    overrides = ["device=cpu", f"cache_dir={work / 'cache'}", "memory.weights=fp32"]
    report = work / "report.json"
    child = CHILD.format(
        root=str(ROOT), who=who, script=str(script), flags=flags, overrides=overrides, report=str(report)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    end = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, env=environment, cwd=work)
    if end.returncode:
        raise SystemExit(f"{who} ended with {end.returncode}:\n{end.stderr[-2000:]}")
    for name in ("out", "cache"):
        shutil.rmtree(work / name, ignore_errors=True)
    return json.loads(report.read_text())


def around(one: dict[str, float], more: dict[str, float], steps: int, quantity: str) -> float:
    """Return what a run of one step spends beside the step."""
    return one[quantity] - (more[quantity] - one[quantity]) / (steps - 1)


def prepare(work: Path, size: str) -> tuple[Path, int]:
    """Write the model and four square pictures; return the model and the resolution."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.memory.sd15_step import write_random_model
    from benchmarks.parity.train_dreambooth import write_model, write_pictures

    if size == "sd15":
        write_random_model(work / "model")
        config = work / "model" / "text_encoder" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["CLIPTextModel"]}))
    else:
        write_model(work / "model")
    write_pictures(work / "photos", 0, side := 64 if size == "sd15" else 32)
    return work / "model", side


def summary(rounds: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Return medians over the rounds, of this package, of the script, and of their ratios within a round."""
    rows: dict[str, dict[str, list[float]]] = {}
    for each in rounds:
        for quantity in QUANTITIES:
            ours, theirs = (
                {
                    "around": around(each[who]["one"], each[who]["more"], steps, quantity),
                    f"whole command, {steps} steps": each[who]["more"][quantity],
                }
                for who in ("lowmem-db", "script")
            )
            for part in ours:
                row = rows.setdefault(f"{quantity} {part}", {"lowmem-db": [], "script": [], "ratio": []})
                row["lowmem-db"].append(ours[part])
                row["script"].append(theirs[part])
                row["ratio"].append(ours[part] / theirs[part])
        for quantity in ("peak_bytes", "written_bytes"):
            row = rows.setdefault(quantity, {"lowmem-db": [], "script": [], "ratio": []})
            values = {who: each[who]["more"][quantity] for who in ("lowmem-db", "script")}
            row["lowmem-db"].append(values["lowmem-db"])
            row["script"].append(values["script"])
            row["ratio"].append(values["lowmem-db"] / values["script"])
    return {name: {who: statistics.median(values) for who, values in row.items()} for name, row in rows.items()}


def main() -> None:
    """Measure in turn, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a clone of diffusers, or the script itself")
    parser.add_argument("--size", choices=("small", "sd15"), default="small")
    parser.add_argument("--steps", type=int, default=5, help="steps of the longer run of each pair")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resumable", action="store_true", help="let the script write a checkpoint at the end too")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    script = (options.diffusers if options.diffusers.is_file() else options.diffusers / SCRIPT).absolute()
    with tempfile.TemporaryDirectory() as name:
        model, resolution = prepare(Path(name), options.size)
        rounds = []
        for index in range(options.rounds + 1):  # the first round warms up the disk's cache
            each = {
                who: {
                    length: run(who, script, model, Path(name), resolution, steps, resumable=options.resumable)
                    for length, steps in (("one", 1), ("more", options.steps))
                }
                for who in ("script", "lowmem-db")
            }
            print(json.dumps(each), file=sys.stderr, flush=True)
            rounds += [each] if index else []
    medians = summary(rounds, options.steps)
    for name, row in medians.items():
        print(f"{name:40} {row['lowmem-db']:16,.1f} {row['script']:16,.1f} {row['ratio']:6.2f}")
    if options.output:
        result = {
            "benchmark": "whole_command",
            "size": options.size,
            "steps": options.steps,
            "resumable": options.resumable,
            "medians": medians,
        }
        options.output.write_text(json.dumps(result | {"rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
