"""Most parameters of the tiny models are stepped alone, as those of large models are."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel

from lowmem_db.models.saving import save_component
from lowmem_db.optimizers import build
from tests.tiny_models import tiny_unet, write_tiny_model


@pytest.fixture(autouse=True)
def _few_small_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_LARGEST_SMALL", 255)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a UNet whose rows hold blocks of 256 elements when they are shared out."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "wide")
    shutil.rmtree(folder / "unet")
    torch.manual_seed(0)
    unet = cast("Any", UNet2DConditionModel.from_config({**tiny_unet().config, "block_out_channels": (32, 64)}))
    save_component(folder / "unet", unet, dtype=torch.float32)
    return folder
