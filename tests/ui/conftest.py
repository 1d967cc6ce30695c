"""A workplace with a run and a draft, and a browser on a server of its own."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from starlette.testclient import TestClient

from lowmem_db.config import shipped
from lowmem_db.config.yaml_text import parse_yaml, read_text
from lowmem_db.ui.app import build_app
from lowmem_db.ui.workplace import Workplace
from tests.reporting.conftest import run_folder  # noqa: F401

REPOSITORY = Path(__file__).parents[2]
PHOTOS = sorted((REPOSITORY / "examples" / "dog3").glob("*.jpg"))[:3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ORIGIN = "http://127.0.0.1:8642"


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "runs")


@pytest.fixture
def client(place: Workplace) -> Iterator[TestClient]:
    with TestClient(build_app(place), base_url=ORIGIN) as client:
        yield client


def quick_recipes(folder: Path) -> Path:
    """Write the configurations of this package, of which ``demo`` takes seconds."""
    shutil.copytree(shipped.CONFIGS, folder)
    text = read_text(folder / "demo.yaml")
    tree = parse_yaml(text)
    tree["prior"] |= {"num_class_images": 2, "num_inference_steps": 1, "sample_batch_size": 2}
    tree["training"] = {"max_train_steps": 6, "train_batch_size": 1, "learning_rate": 0.001}
    tree["sampling"] |= {"num_images": 1, "num_inference_steps": 1}
    tree["prior"].pop("class_prompts")
    tree["data"] |= {"num_crops": 1}
    tree["checkpointing"] = {"every": 3}
    (folder / "demo.yaml").write_text(text.split("output_dir")[0] + yaml.safe_dump(tree, sort_keys=False))
    return folder
