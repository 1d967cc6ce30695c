import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lowmem_db.models.autoencoder_taef2 as module
from lowmem_db.models.autoencoder_taef2 import AutoencoderTAEF2

FOLDER = Path(module.__file__).parent / "demo" / "base" / "vae"
PHOTO = Path(__file__).parent / "data" / "dog.jpg"


@pytest.fixture(scope="module")
def vae() -> AutoencoderTAEF2:
    return AutoencoderTAEF2.from_pretrained(FOLDER, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    pixels = np.asarray(Image.open(PHOTO).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_encode_and_decode_shapes(vae: AutoencoderTAEF2) -> None:
    with torch.no_grad():
        latents = vae.encode(torch.zeros(2, 3, 64, 96)).latents
        assert latents.shape == (2, 32, 8, 12)
        assert vae.decode(latents).sample.shape == (2, 3, 64, 96)
        (sample,) = vae.decode(latents, return_dict=False)
    assert sample.shape == (2, 3, 64, 96)


def test_pipeline_derives_factor_eight(vae: AutoencoderTAEF2) -> None:
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 8
    assert vae.config.scaling_factor == 1.0


@torch.no_grad()
def test_round_trip_of_a_photo(vae: AutoencoderTAEF2, photo: torch.Tensor) -> None:
    error = ((vae(photo).sample - photo) / 2).square().mean().item()
    assert -10 * math.log10(error) > 26


@torch.no_grad()
def test_latents_are_standardised(vae: AutoencoderTAEF2, photo: torch.Tensor) -> None:
    raw = vae.encoder((photo + 1) / 2)
    expected = (raw - torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)) / torch.tensor(
        vae.config.latents_std
    ).view(1, -1, 1, 1)
    assert torch.allclose(vae.encode(photo).latents, expected, atol=1e-6)
    assert 0.5 < expected.std() < 2.0


@torch.no_grad()
def test_save_and_load_equal(tmp_path: Path, photo: torch.Tensor) -> None:
    torch.manual_seed(0)
    fresh = AutoencoderTAEF2(latents_mean=[0.5] * 32, latents_std=[2.0] * 32).eval()
    fresh.save_pretrained(tmp_path)
    loaded = AutoencoderTAEF2.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.encode(photo).latents, fresh.encode(photo).latents)
    assert torch.equal(loaded(photo).sample, fresh(photo).sample)
