"""What a run writes beside its checkpoints and its model is part of what the plan says about the disk."""

import json
from pathlib import Path

from lowmem_db.cli.train import train
from lowmem_db.config.loading import load_config
from lowmem_db.planning.disk import record_bytes

SAMPLES = {
    "training.max_train_steps": 3, "checkpointing.every": 1, "sampling.prompts": ["a zx dog", "a dog"],
    "sampling.num_images": 2, "sampling.num_inference_steps": 2, "sampling.at_start": True, "logging.tensorboard": True,
}  # fmt: skip


def test_samples_curves_and_page_stay_within_what_is_said(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | SAMPLES
    train([f"{name}={json.dumps(value)}" for name, value in fields.items()])
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    written = sum(file.stat().st_size for file in files if not {"checkpoints", "final"} & set(file.parts))
    assert len(list((tmp_path / "run" / "samples").glob("*/*.png"))) >= 4 * 5
    assert 0 < written <= record_bytes(load_config(None, list(fields.items())))


def test_every_sample_counts(tiny_fields: dict[str, object]) -> None:
    def said(**changes: object) -> int:
        changed = {name.replace("__", "."): value for name, value in changes.items()}
        return record_bytes(load_config(None, list((tiny_fields | SAMPLES | changed).items())))

    without = said(sampling__prompts=[], sampling__at_start=False)
    one = said(sampling__num_images=1) - without
    assert one > 0
    assert said() - without == 2 * one
    assert said(sampling__every=3) - without == one  # steps 0 and 3 instead of 0 to 3
