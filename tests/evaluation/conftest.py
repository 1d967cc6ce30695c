"""Fixtures: tiny encoders in the layout of the real ones, and photographs of three subjects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from tests.tiny_models import NUM_TOKENS, write_byte_tokenizer

PHOTOGRAPHS = Path(__file__).parents[1] / "assets" / "dreambooth"
SUBJECTS = ("bear_plushie", "dog3", "robot_toy")
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def en0() -> Encoder:
    return load_encoder(find_encoders(["en0"])[0], CPU)


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "dino"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    write_preprocessing(folder, {"size": 32, "do_resize": True})
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "clip"
    torch.manual_seed(1)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {
        "vocab_size": 514, "max_position_embeddings": NUM_TOKENS, "bos_token_id": 512, "eos_token_id": 513,
        "pad_token_id": 513,
    }  # fmt: skip
    config = CLIPConfig(
        text_config=layers | tokens, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    write_byte_tokenizer(folder)
    write_preprocessing(folder, {"size": 32, "do_center_crop": True, "crop_size": 32, "do_resize": True})
    return folder


@pytest.fixture(scope="session")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "lpips.pth"
    torch.save(alexnet_weights(), path)
    return path


@pytest.fixture
def images_dir(tmp_path: Path) -> Path:
    """Two prompts with two images each, of one subject."""
    return write_images(tmp_path / "images", ["a dog", "a cat"], 2)


def write_preprocessing(folder: Path, fields: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = fields | {"resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(whole))


def write_images(folder: Path, prompts: list[str], num_images: int, *, seed: int = 0, pixels: int = 40) -> Path:
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    for number in range(len(prompts)):
        for index in range(num_images):
            random_picture(1000 * seed + 10 * number + index, pixels).save(folder / f"{number:02d}-{index:02d}.png")
    return folder


def random_picture(seed: int, pixels: int = 40) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((pixels, pixels))


def alexnet_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the names of ``lpips.LPIPS(net="alex").state_dict()``."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        "slice1.0": (64, 3, 11), "slice2.3": (192, 64, 5), "slice3.6": (384, 192, 3), "slice4.8": (256, 384, 3),
        "slice5.10": (256, 256, 3)
    }  # fmt: skip
    weights = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for index, (name, (outputs, inputs, kernel)) in enumerate(layers.items()):
        scale = (inputs * kernel**2) ** -0.5
        weights[f"net.{name}.weight"] = scale * torch.randn(outputs, inputs, kernel, kernel, generator=generator)
        weights[f"net.{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
        weights[f"lin{index}.model.1.weight"] = torch.rand(1, outputs, 1, 1, generator=generator)
        weights[f"lins.{index}.model.1.weight"] = weights[f"lin{index}.model.1.weight"]
    return weights
