"""Both ways to train, through the one protocol."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lowmem_db.adaptation.adapters import LowRankAdapters
from lowmem_db.adaptation.base import Stateful
from lowmem_db.adaptation.finding import find_adaptation
from lowmem_db.adaptation.full import FullWeights
from lowmem_db.adaptation.layers import count_trained
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from tests.tiny_models import tiny_text_encoder, tiny_unet

WAYS = {
    "full": {"memory.weights": "bf16_extra_bits"},
    "layers": {"training.layers": ["unet.mid_block.*"]},
    "lora": {"lora.enabled": True},
    "dora": {"lora.enabled": True, "lora.dora": True},
}


@pytest.fixture
def config(tiny_fields: dict[str, object], request: pytest.FixtureRequest) -> Config:
    return load_config(None, list((tiny_fields | WAYS[request.param]).items()))


def test_the_configuration_chooses(tiny_config: Config) -> None:
    lora = tiny_config.lora.model_copy(update={"enabled": True})
    assert isinstance(find_adaptation(tiny_config), FullWeights)
    assert isinstance(find_adaptation(tiny_config.model_copy(update={"lora": lora})), LowRankAdapters)


@pytest.mark.parametrize("config", WAYS, indirect=True)
def test_undo_gives_the_model_back_as_it_was_and_frozen(config: Config) -> None:
    modules: dict[str, nn.Module] = {"unet": tiny_unet()}
    before = {name: tensor.clone() for name, tensor in modules["unet"].state_dict().items()}
    attached = find_adaptation(config).attach(modules)
    assert count_trained(modules)["unet"] > 0
    attached.undo()
    after = modules["unet"].state_dict()
    assert list(after) == list(before)
    if config.memory.weights is None:
        assert all(torch.equal(after[name], before[name]) for name in before)
    else:  # 24 bits hold the first 16 of fp32's 23 bits of fraction
        assert all(torch.allclose(after[name], before[name], rtol=2.0**-16, atol=0) for name in before)
    assert count_trained(modules) == {"unet": 0}


@pytest.mark.parametrize("config", ["full", "lora"], indirect=True)
def test_a_checkpoint_holds_what_trains(config: Config) -> None:
    modules: dict[str, nn.Module] = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    adaptation = find_adaptation(config)
    adaptation.attach(modules)
    state = adaptation.state("unet", modules["unet"])
    assert isinstance(state, Stateful)
    names = set(state.state_dict())
    assert all(".lora_" in name for name in names) == config.lora.enabled
    assert names


def test_final_model_and_messages_know_what_was_trained(tiny_config: Config, tiny_model: Path) -> None:
    lora = tiny_config.model_copy(update={"lora": tiny_config.lora.model_copy(update={"enabled": True})})
    assert [find_adaptation(config).noun for config in (tiny_config, lora)] == ["model", "LoRA"]
