"""A run in aspect-ratio buckets: nothing is lost of the photos but what the nearest shape cuts, and it resumes."""

import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.data.batches import BatchSource
from lowmem_db.models.finding import model_of
from lowmem_db.preparation.prepare import check_photos, prepare
from tests.integration.test_resume import final_bytes, kill_in_step, metric_rows, run_in_child

CPU = torch.device("cpu")


@pytest.fixture
def fields(tiny_fields: dict[str, object]) -> dict[str, object]:
    """The photos are 96 x 96, 120 x 80 and 80 x 128 pixels."""
    return tiny_fields | {"data.aspect_ratio_buckets": True, "checkpointing.every": 2}


def prepared(fields: dict[str, object]) -> tuple[Config, BatchSource]:
    config = load_config(None, list(fields.items()))
    return config, prepare(config, model_of(config), CPU, check_photos(config))


def test_photos_and_class_images_have_the_same_sizes(fields: dict[str, object]) -> None:
    config, batches = prepared(fields)
    shapes = [image.shape for image in batches.instance_images]
    assert shapes == [(16, 16), (12, 20), (20, 12)]  # latent pixels of 2: 32 x 32, 24 x 40 and 40 x 24 pixels
    of_class = [image.shape for image in batches.class_images]
    assert sorted(of_class.count(shape) for shape in shapes) == [1, 2, 2]
    sizes = set()
    for manifest in (config.cache_dir / "class_images").glob("*/manifest.json"):
        for file in manifest.parent.glob("*.png"):
            with Image.open(file) as picture:
                sizes.add(picture.size)
    assert sizes == {(32, 32), (40, 24), (24, 40)}
    for step in range(6):
        (batch,) = batches.batches_at(step)
        assert len(batch.sources) == 2


def test_squares_are_shared_with_runs_without_buckets(
    fields: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(fields | {"data.aspect_ratio_buckets": False})
    capsys.readouterr()
    prepared(fields)
    said = capsys.readouterr().err
    assert "photos by size (width x height): 40 x 24: 1, 32 x 32: 1, 24 x 40: 1" in said
    assert said.count("class images: drawing") == 2
    assert "class images: found all 2 in" in said


@pytest.mark.parametrize("kept", [False, True])
def test_class_dir_has_a_folder_for_each_shape_or_is_the_users_own(
    fields: dict[str, object], tmp_path: Path, kept: bool
) -> None:
    folder = tmp_path / "class"
    if kept:
        folder.mkdir()
        for index in range(2):
            Image.new("RGB", (100, 90 + index), "red").save(folder / f"{index}.png")
    _, batches = prepared(fields | {"prior.class_dir": str(folder)})
    if kept:
        shapes = [image.shape for image in batches.class_images]
        assert sorted(shapes) == sorted([(16, 16), (12, 20), (20, 12)] * 2)
        return
    assert {str(file.parent.relative_to(folder)) for file in folder.rglob("*.png")} == {".", "40x24", "24x40"}
    again = prepared(fields | {"prior.class_dir": str(folder)})[1]
    assert len(again.class_images) == len(batches.class_images) == 5


@pytest.mark.long
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(fields: dict[str, object], tmp_path: Path) -> None:
    chosen = fields | {"training.train_batch_size": 2, "training.gradient_accumulation_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (
        run_in_child(chosen | {"output_dir": str(killed)}, kill_in_step(3, "aspect ratio buckets")) == -signal.SIGKILL
    )
    assert run_in_child(chosen | {"output_dir": str(killed)}) == 0
    assert run_in_child(chosen | {"output_dir": str(whole)}) == 0
    assert final_bytes(killed) == final_bytes(whole)
    assert metric_rows(killed) == metric_rows(whole)
    assert metric_rows(whole)[-1]["step"] == 4
