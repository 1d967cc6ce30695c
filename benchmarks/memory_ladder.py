"""From plain fp32 AdamW down, one technique at a time: the peak of a training step, predicted and measured.

    python benchmarks/memory_ladder.py [--device cuda] [--tiny] [--output FILE.jsonl] [--picture FILE.png]

Bytes of tensors while a step of UNet and text encoders runs on one photo and one class image. `sd15` and `sdxl` are
predicted: traces of the real step on the meta device, 512 and 1024 px. `demo` is the small model of this package at
128 px, predicted alike and measured: three real steps, on the CPU with every storage followed, on a CUDA device by its
allocator. Prints a JSON line per rung, then a table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lowmem_db.config.loading import load_config  # noqa: E402
from lowmem_db.config.schema import Config  # noqa: E402
from lowmem_db.config.strategy import resolve  # noqa: E402
from lowmem_db.models.finding import model_of  # noqa: E402
from lowmem_db.planning.cards import CPU, find_card  # noqa: E402
from lowmem_db.planning.measured import measure_train  # noqa: E402
from lowmem_db.planning.phases import TracedRun, trace_train  # noqa: E402

GIB, MIB = 1 << 30, 1 << 20
RUNGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fp32, AdamW", {"training.mixed_precision": "bf16"}),
    ("+ checkpointed segments", {"memory.checkpointing": "segments"}),
    ("+ 8-bit states", {"optimizer.name": "adamw8bit"}),
    ("+ optimizer in backward", {"memory.optimizer_in_backward": True}),
    ("+ 24-bit weights", {"memory.weights": "bf16_extra_bits"}),
    ("+ streamed states", {"memory.stream_optimizer_state": True}),
    ("+ checkpoints on the host", {"memory.offload_checkpoints": True}),
    ("+ streamed weights", {"memory.stream_weights": True}),
)
MODELS = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 1024),
    "demo": ("demo", 128),
}


def config_of(model: str, fields: dict[str, Any]) -> Config:
    """Return the configuration of a rung."""
    base, resolution = MODELS[model]
    needed = {
        "model.base": base, "subject.instance_dir": "photos", "subject.instance_prompt": "a sks dog",
        "subject.class_prompt": "a dog", "output_dir": "run", "data.resolution": resolution,
        "training.train_text_encoder": True,
    }  # fmt: skip
    return load_config(None, list((needed | fields).items()))


def measure_rung(model: str, fields: dict[str, Any], *, measured: str | None) -> dict[str, int]:
    """Return the predicted bytes of a rung, and those measured on a device if one is given.

    What is measured on the CPU computes without autocast, and is predicted for the CPU too.
    """
    if measured == "cpu":
        fields = {name: value for name, value in fields.items() if name != "training.mixed_precision"}
    config = resolve(config_of(model, fields))
    folder = model_of(config, weights=False)
    card = CPU if measured == "cpu" else find_card("RTX 3060")
    traced = trace_train(TracedRun(config=config, model=folder, card=card))
    found = {"predicted_bytes": traced.peak.total, "host_bytes": traced.host_bytes}
    if measured:
        found["measured_bytes"] = measure_train(config, folder, torch.device(measured)).tensor_bytes
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the predicted bars of Stable Diffusion 1.5 and SDXL."""
    left, width, row_height = 190, 330, 26
    picture = Image.new("RGB", (left + 2 * width + 20, 40 + row_height * len(rows)), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for column, model in enumerate(("sd15", "sdxl")):
        start = left + column * width
        title = {"sd15": "Stable Diffusion 1.5, 512 px", "sdxl": "SDXL, 1024 px"}[model]
        canvas.text((start, 10), f"{title}: GiB (predicted)", fill="black", font=font)
        largest = rows[0][model]["predicted_bytes"]
        for index, row in enumerate(rows):
            top, size = 36 + index * row_height, row[model]["predicted_bytes"]
            canvas.rectangle((start, top, start + (width - 70) * size / largest, top + 18), fill="#4477aa")
            label = f"{size / GIB:.1f}"
            canvas.text((start + (width - 70) * size / largest + 6, top + 1), label, fill="black", font=font)
    for index, row in enumerate(rows):
        canvas.text((8, 37 + index * row_height), row["rung"], fill="black", font=font)
    picture.save(path, optimize=True)


def main() -> None:
    """Climb down, print JSON lines and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--device", default="cpu", help="where the small model is measured")
    parser.add_argument("--tiny", action="store_true", help="the small model alone, to try the script")
    options = parser.parse_args()
    models = ["demo"] if options.tiny else list(MODELS)
    fields: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for rung, changed in RUNGS:
        fields |= changed
        row = {"rung": rung} | {
            model: measure_rung(model, fields, measured=options.device if model == "demo" else None) for model in models
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    if not options.tiny:
        print_table(rows)
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if options.picture:
        draw(rows, options.picture)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rungs of all models."""
    print("| | SD 1.5, 512 px | SDXL, 1024 px | on the host | demo: predicted | demo: measured |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        sd15, sdxl, demo = (row[model] for model in MODELS)
        cells = [
            row["rung"],
            f"{sd15['predicted_bytes'] / GIB:.2f} GiB",
            f"{sdxl['predicted_bytes'] / GIB:.2f} GiB",
            f"{sd15['host_bytes'] / GIB:.1f} / {sdxl['host_bytes'] / GIB:.1f} GiB",
            f"{demo['predicted_bytes'] / MIB:.1f} MiB",
            f"{demo['measured_bytes'] / MIB:.1f} MiB",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
