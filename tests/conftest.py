"""Fixtures: a tiny model, photos, and a configuration that trains it in a second."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from tests.tiny_models import RESOLUTION, write_tiny_model, write_tiny_sdxl

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: two run at a time, on two cores
settings.register_profile("lowmem_db", deadline=None)  # timing never decides a test
settings.load_profile("lowmem_db")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny_xl")


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index, size in enumerate([(96, 96), (120, 80), (80, 128)]):
        pixels = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"photo{index}.png")
    return folder


@pytest.fixture
def tiny_fields(tiny_model: Path, photos_dir: Path, tmp_path: Path) -> dict[str, object]:
    """Fields of a run that takes a second."""
    return fields_in(tmp_path, tiny_model, photos_dir)


def fields_in(folder: Path, model: Path, photos: Path) -> dict[str, object]:
    """Return the fields of ``tiny_fields`` for a run and a cache in any folder."""
    return {
        "model.base": str(model),
        "subject.instance_dir": str(photos),
        "subject.instance_prompt": "a zx dog",
        "subject.class_prompt": "a dog",
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "device": "cpu",
        "data.resolution": RESOLUTION,
        "prior.num_class_images": 5,
        "prior.num_inference_steps": 2,
        "training.max_train_steps": 4,
        "training.learning_rate": 1e-3,
        "logging.tensorboard": False,
    }


@pytest.fixture
def tiny_config(tiny_fields: dict[str, object]) -> Config:
    return load_config(None, list(tiny_fields.items()))
