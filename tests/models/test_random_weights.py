"""Models whose weights are drawn."""

import pytest
import torch

from lowmem_db.models import random_weights
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.random_weights import random_model
from lowmem_db.storage.places import DEMO_DIR

CPU = torch.device("cpu")
MODEL = random_model("demo", ModelFiles(path=DEMO_DIR), CPU)


def test_weights_are_drawn_alike_each_time_and_are_not_those_of_the_file() -> None:
    state = torch.get_rng_state()
    one, other = (MODEL.load("unet", dtype=torch.bfloat16).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == torch.bfloat16 for name in one)
    from_file = random_weights.ModelFolder(name="demo", path=DEMO_DIR, family=MODEL.family).load("unet").state_dict()
    assert from_file.keys() == one.keys()
    assert not torch.equal(from_file["conv_in.weight"], one["conv_in.weight"].float())


def test_text_encoder_has_its_positions() -> None:
    encoder = MODEL.load("text_encoder")
    positions = next(buffer for name, buffer in encoder.named_buffers() if name.endswith("position_ids"))
    assert positions.flatten().tolist()[:3] == [0, 1, 2]
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_nothing_is_drawn_on_the_meta_device() -> None:
    assert MODEL.load("unet", torch.device("meta")).conv_in.weight.is_meta


def test_what_does_not_fit_the_device_is_drawn_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights.environment, "free_bytes", lambda device: 1000)
    model = random_model("demo", ModelFiles(path=DEMO_DIR), torch.device("meta"))  # where nothing could be drawn
    assert model.load("unet").conv_in.weight.device == CPU
