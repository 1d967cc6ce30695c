"""A whole command, from its start to its end, beside diffusers' ``train_dreambooth.py`` with the same flags.

    git clone --depth 1 https://github.com/huggingface/diffusers
    OMP_NUM_THREADS=1 python benchmarks/speed/whole_command.py --diffusers diffusers

A small random model with prior preservation, on the CPU; both commands in turn, round after round, each in a process of
its own. Printed are processor seconds, seconds and bytes written of each, the median, and the ratios. The first round
of this package also encodes the pictures; the later ones find them in the cache, as a second run of a user does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = Path("examples/dreambooth/train_dreambooth.py")
OURS, THEIRS = "lowmem-db train", "train_dreambooth.py"


def run_measured(report: Path, script: str, flags: list[str]) -> None:
    """Run a command in this process, and report what it took."""
    started = time.perf_counter()
    try:
        if script == OURS:
            from lowmem_db.cli.main import main

            sys.argv = ["lowmem-db", "train", THEIRS, *flags]
            main()
        else:
            sys.path.insert(0, str(ROOT))
            from benchmarks.parity.script import load_script

            module = load_script(Path(script))
            module.main(module.parse_args(flags))
    finally:
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        taken = {
            "processor_seconds": time.process_time(),
            "seconds": time.perf_counter() - started,
            "bytes_written": int(counters["wchar"]),
        }
        report.write_text(json.dumps(taken))


def measure(root: Path, script: str, flags: list[str], out: Path) -> dict[str, float]:
    """Run a command in a process of its own, and return what it took."""
    report = root / "report.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "LOWMEM_DB_CACHE": str(root / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, __file__, "--measured", str(report), script, *flags, f"--output_dir={out}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not report.is_file() or done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    taken = json.loads(report.read_text())
    report.unlink()
    return taken


def write_job(root: Path) -> list[str]:
    """Write a small model and pictures; return the flags of a job on them."""
    sys.path.insert(0, str(ROOT))
    import torch
    from diffusers import UNet2DConditionModel

    from benchmarks.parity.train_dreambooth import write_model, write_pictures
    from lowmem_db.models.saving import save_component
    from tests.tiny_models import tiny_unet

    model = write_model(root / "model")
    unet = UNet2DConditionModel.from_config({**tiny_unet().config, "block_out_channels": (64, 128)})
    save_component(model / "unet", unet, dtype=torch.float32)
    return [
        f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={write_pictures(root / 'photos', 0)}",
        "--instance_prompt=a zx dog", "--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=4",
        f"--class_data_dir={write_pictures(root / 'class', 1)}", "--resolution=32", "--train_batch_size=1",
        "--learning_rate=1e-5", "--lr_scheduler=constant", "--mixed_precision=no", "--seed=1",
    ]  # fmt: skip


def main() -> None:
    """Measure both commands in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a clone of diffusers, or the script itself")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    script = arguments.diffusers if arguments.diffusers.is_file() else arguments.diffusers / SCRIPT
    taken: dict[str, list[dict[str, float]]] = {THEIRS: [], OURS: []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        flags = [*write_job(root), f"--max_train_steps={arguments.steps}"]
        for index in range(arguments.rounds):
            for command, source in ((THEIRS, str(script)), (OURS, OURS)):
                taken[command].append(measure(root, source, flags, root / f"{command.split()[0]}-{index}"))
                print(json.dumps({"command": command, **taken[command][-1]}), flush=True)
    figures: dict[str, Any] = {"steps": arguments.steps, "rounds": taken}
    for quantity in taken[OURS][0]:
        median = {command: statistics.median(each[quantity] for each in rows) for command, rows in taken.items()}
        figures[f"ratio_of_{quantity}"] = round(median[OURS] / median[THEIRS], 3)
        print(f"{quantity}: {median[OURS]:.2f} against {median[THEIRS]:.2f}, ratio {median[OURS] / median[THEIRS]:.2f}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        run_measured(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
