import json
import math
from pathlib import Path

import pytest
from PIL import Image


def _picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x013B] = "secret artist"
    Image.new("RGB", (64, 48), colour).save(path, exif=exif)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder as `train` writes it: 30 steps, samples of two of them, two checkpoints, a final model."""
    root = tmp_path / "my <b>dog</b>"
    photos = tmp_path / "private_photos"
    _picture(photos / "one.jpg", "red")
    for step in (10, 20):
        for name in ("00-00", "00-01", "01-00", "grid"):
            _picture(root / "samples" / f"step-{step:06d}" / f"{name}.png", "blue")
        checkpoint = root / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").write_text("{}")
    (root / "final").mkdir()
    (root / "config.yaml").write_text(
        f"output_dir: {json.dumps(str(root))}\n"
        "model: {base: /home/somebody/models/base}\n"
        f"subject: {{instance_dir: {json.dumps(str(photos))}, instance_prompt: a zx <i>dog</i>}}\n"
        "sampling: {prompts: [a zx dog, '<script>alert(1)</script>']}\n"
        "training: {max_train_steps: 30, learning_rate: 0.001}\n"
    )
    rows = [
        {"step": step, "loss": 1.0 / step, "loss_instance": 0.7 / step, "loss_prior": 0.3, "lr": 1e-3,
         "lr_text_encoder": None, "grad_norm": 1.0, "seconds": 0.5, "peak_bytes": 3 << 30}
        for step in range(1, 31)
    ]  # fmt: skip
    rows[5]["loss_instance"] = math.nan
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "lo')
    (root / "scores.jsonl").write_text('{"step": 10, "score": 0.25}\n{"step": 20, "score": 0.5}\n')
    parts = {"weights": 1 << 30, "optimizer_state": 1 << 29, "gradients": 0, "activations": 1 << 28, "other": 0}
    (root / "plan.json").write_text(
        json.dumps({"peak_bytes": 2 << 30, "budget_bytes": 4 << 30, "phases": [{"name": "train", "parts": parts}]})
    )
    (root / "environment.json").write_text(json.dumps({"versions": {"torch": "9.9"}, "devices": [{"name": "a card"}]}))
    return root
