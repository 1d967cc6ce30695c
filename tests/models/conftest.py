"""Copies of the tiny model that a test may damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.fixture
def pickle_weights() -> Callable[[Path], None]:
    """Replace the safetensors of a component by a pickle."""

    def pickle(component: Path) -> None:
        (file,) = component.glob("*.safetensors")
        name = "pytorch_model.bin" if file.name == "model.safetensors" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), component / name)
        file.unlink()

    return pickle
