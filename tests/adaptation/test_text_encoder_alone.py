"""Only the text encoder trains: the denoiser is in memory, and stays as it is in the checkpoint and in ``final/``."""

import json
from pathlib import Path

import pytest
import torch

from lowmem_db import fingerprint
from lowmem_db.config.loading import load_config
from lowmem_db.models.finding import find_model
from lowmem_db.run.run import train

LAYERS = {"training.train_text_encoder": True, "training.layers": ["text_encoder.*token_embedding*"]}


@pytest.mark.parametrize("memory", [{}, {"memory.weights": "bf16_extra_bits", "memory.optimizer_in_backward": True}])
def test_token_embeddings_train_alone(
    tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path, memory: dict[str, object]
) -> None:
    fields = tiny_fields | LAYERS | memory | {"training.max_train_steps": 2, "prior.enabled": False}
    run = train(load_config(None, list(fields.items())))
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [(row["lr"], row["lr_text_encoder"]) for row in rows] == [(None, 1e-3)] * 2
    checkpoint = run.checkpoint_dir(2)
    assert sorted(file.name for file in checkpoint.iterdir()) == [
        "COMPLETE", "optimizer.safetensors", "state.json", "text_encoder.safetensors",
    ]  # fmt: skip
    unets = [next((folder / "unet").glob("*.safetensors")) for folder in (tiny_model, run.final_dir)]
    assert fingerprint.of_file(unets[0]) == fingerprint.of_file(unets[1])
    before, after = (
        find_model(str(folder)).load("text_encoder").state_dict() for folder in (tiny_model, run.final_dir)
    )
    # weights of 24 bits that do not train are rounded once
    changed = [name for name in before if not torch.allclose(before[name], after[name], rtol=2.0**-16, atol=0)]
    assert [name for name in changed if "token_embedding" in name]
    assert all("token_embedding" in name for name in changed)
