"""Losses of the demo's first steps, kept in a file: a change that only saves memory or time leaves them as they are.

After a change that is meant to alter them: ``python -m tests.golden.test_demo_losses`` writes the file anew.
"""

import json
import tempfile
from pathlib import Path

import pytest

from lowmem_db.cli.train import train

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("demo_losses.json")
NAMES = ("loss", "loss_instance", "loss_prior", "grad_norm")


def first_steps(work: Path) -> list[dict[str, float]]:
    train(
        [
            str(ROOT / "configs" / "demo.yaml"),
            f"subject.instance_dir={ROOT / 'examples' / 'drawn_dog'}",
            "prior.class_prompts=[a cat]",
            f"output_dir={work / 'run'}",
            f"cache_dir={work / 'cache'}",
            "device=cpu",
            "prior.num_class_images=2",
            "prior.num_inference_steps=4",
            "training.max_train_steps=3",
            "training.lr_warmup_steps=0",
            "training.train_batch_size=2",
            "sampling.prompts=[]",
            "logging.tensorboard=false",
        ]
    )
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in NAMES} for row in rows]


def test_first_losses_of_the_demo_are_as_before(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    for found, expected in zip(first_steps(tmp_path), golden, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(first_steps(Path(folder)), indent=2) + "\n")
