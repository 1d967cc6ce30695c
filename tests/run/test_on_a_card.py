"""A whole run on a CUDA device: it is prepared, trains, draws, and goes on from a checkpoint with the same bits."""

from pathlib import Path

import pytest
import torch

from lowmem_db import api

DEVICE = "cuda"


def files_of(folder: Path) -> dict[str, bytes]:
    files = [file for kind in ("*.safetensors", "*.png") for file in folder.rglob(kind)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if "checkpoints" not in file.parts}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_run_that_goes_on_ends_as_it_ended_before(tiny_fields: dict[str, object]) -> None:
    more = {"checkpointing.every": 2, "checkpointing.keep": 3, "sampling.prompts": ["a zx dog"], "device": DEVICE}
    config = api.load_config(None, tiny_fields | more)
    run = api.train(config)
    before = files_of(run.root)
    assert any("samples" in name for name in before)
    assert any("final" in name for name in before)
    api.train(config, step=2)
    assert files_of(run.root) == before
