"""An autoencoder whose activations fp16 cannot hold, as SDXL's: it computes in fp32 wherever it is used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_db.config.loading import load_config
from lowmem_db.errors import NonFiniteError
from lowmem_db.models.families.spaces import LatentSpace
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.cards import find_card
from lowmem_db.planning.phases import TracedRun, trace_class_images
from lowmem_db.preparation.prepare import check_photos, prepare

LARGE = 3e5
"""More than the largest fp16, 65504."""


@pytest.fixture(scope="module")
def overflowing(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The tiny model, with large activations behind the first layers; the norms scale them down again."""
    folder = shutil.copytree(tiny_sdxl, tmp_path_factory.mktemp("overflowing") / "model")
    (file,) = (folder / "vae").glob("*.safetensors")
    weights = load_file(file)
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        weights[name] *= LARGE
    save_file(weights, file, {"format": "pt"})
    return find_model(str(folder))


def set_upcast(model: ModelFolder, value: bool) -> None:
    file = model.path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_upcast": value}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_force_upcast_is_obeyed(overflowing: ModelFolder, dtype: torch.dtype) -> None:
    set_upcast(overflowing, True)
    codec = LatentSpace(overflowing).load(dtype=dtype)
    assert codec.autoencoder.dtype == torch.float32
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = codec.encode(pixels)
    assert torch.isfinite(mean).all()
    assert torch.isfinite(std).all()
    assert torch.isfinite(codec.decode(mean.half())).all()


def test_it_would_overflow_otherwise(overflowing: ModelFolder) -> None:
    """Else the test above shows nothing."""
    set_upcast(overflowing, False)
    codec = LatentSpace(overflowing).load(dtype=torch.float16)
    assert codec.autoencoder.dtype == torch.float16
    with pytest.raises(NonFiniteError, match="pictures that are infinite or NaN"):
        codec.decode(torch.randn(1, 4, 16, 16))


def test_class_images_drawn_in_fp16_are_pictures(overflowing: ModelFolder, tiny_fields: dict[str, object]) -> None:
    set_upcast(overflowing, True)
    changed = {"model.base": str(overflowing.path), "prior.precision": "fp16", "prior.num_class_images": 2}
    config = load_config(None, list((tiny_fields | changed | {"prior.sample_batch_size": 2}).items()))
    batches = prepare(config, overflowing, torch.device("cpu"), check_photos(config))
    for image in batches.class_images:
        assert torch.isfinite(image.mean).all()
        assert image.mean.std() > 0


def test_the_plan_prices_the_autoencoder_in_the_type_it_computes_in(
    overflowing: ModelFolder, tiny_fields: dict[str, object]
) -> None:
    config = load_config(None, list((tiny_fields | {"model.base": str(overflowing.path)}).items()))
    run = TracedRun(config=config, model=overflowing, card=find_card("rtx 4090"))
    weights = {}
    for value in (False, True):
        set_upcast(overflowing, value)
        weights[value] = trace_class_images(run).resident.weights  # the UNet is gone by then
    two_bytes_more = 2 * overflowing.num_parameters("vae")
    assert weights[True] - weights[False] == pytest.approx(two_bytes_more, rel=0.2)  # rounded to 512 bytes each
