"""Pixels against those of transformers' own image processors."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowmem_db.errors import ModelError
from lowmem_db.evaluation.preprocessing import read_preprocessing
from tests.evaluation.conftest import random_picture, write_preprocessing

transformers_clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
transformers_vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")

CLIP = {"do_center_crop": True, "crop_size": 224, "size": 224, "do_resize": True, "do_normalize": True}
DINO = {"do_normalize": True, "do_resize": True, "size": 224}
NEW_CLIP = CLIP | {"crop_size": {"height": 96, "width": 96}, "size": {"shortest_edge": 100}, "rescale_factor": 1 / 255}
NEW_DINO = DINO | {"size": {"height": 96, "width": 64}}


def picture(width: int, height: int) -> Image.Image:
    return random_picture(0, 300).resize((width, height))


@pytest.mark.parametrize("fields", [CLIP, NEW_CLIP])
@pytest.mark.parametrize("size", [(300, 200), (131, 257), (60, 60)])
def test_pixels_of_clip(tmp_path: Path, fields: dict, size: tuple[int, int]) -> None:
    write_preprocessing(tmp_path, fields)
    theirs = transformers_clip.CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = theirs(picture(*size), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(read_preprocessing(tmp_path)(picture(*size)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [DINO, NEW_DINO])
@pytest.mark.parametrize("size", [(300, 200), (60, 60)])
def test_pixels_of_dino(tmp_path: Path, fields: dict, size: tuple[int, int]) -> None:
    write_preprocessing(tmp_path, fields)
    theirs = transformers_vit.ViTImageProcessorPil.from_pretrained(tmp_path)
    expected = theirs(picture(*size), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(read_preprocessing(tmp_path)(picture(*size)), expected, atol=1e-5, rtol=0)


def test_processor_that_holds_an_image_processor_is_read(tmp_path: Path) -> None:
    write_preprocessing(tmp_path, NEW_CLIP)
    alone = read_preprocessing(tmp_path)
    fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    assert read_preprocessing(tmp_path) == alone


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json"):
        read_preprocessing(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"size": "large", "image_mean": [], "image_std": []}'])
def test_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: is damaged"):
        read_preprocessing(tmp_path)
