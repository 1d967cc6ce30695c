import pytest

from lowmem_db.adaptation.layers import count_trained, named_layers, train_layers
from lowmem_db.errors import ConfigError
from tests.tiny_models import tiny_text_encoder, tiny_text_encoder_2, tiny_unet


def test_layers_of_text_encoders_are_called_as_in_published_files() -> None:
    for component, module in (("text_encoder", tiny_text_encoder()), ("text_encoder_2", tiny_text_encoder_2())):
        names = named_layers({component: module})
        assert f"{component}.text_model.encoder.layers.0.self_attn.q_proj" in names
        outside = {name for name in names if not name.startswith(f"{component}.text_model.")}
        assert outside == ({"text_encoder_2.text_projection"} if component == "text_encoder_2" else set())


def test_all_layers_train_without_a_pattern() -> None:
    modules = {"unet": tiny_unet().requires_grad_(False)}
    train_layers(modules, ())
    assert count_trained(modules) == {"unet": sum(parameter.numel() for parameter in modules["unet"].parameters())}


def test_only_layers_that_patterns_select_train() -> None:
    modules = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    train_layers(modules, ["unet.*.attn2.to_k", "unet.conv_in", "*.mlp.fc1"])
    trained = {
        f"{component}.{name}"
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    assert {"unet.conv_in.weight", "unet.conv_in.bias"} <= trained
    endings = (".attn2.to_k.weight", "conv_in.weight", "conv_in.bias", ".mlp.fc1.weight", ".mlp.fc1.bias")
    assert all(name.endswith(endings) for name in trained)
    assert sum(name.endswith("attn2.to_k.weight") for name in trained) == 4
    assert sum(name.endswith("fc1.weight") for name in trained) == 2


def test_pattern_that_selects_no_layer_names_layers_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"training\.layers: 'unet\.midblock\.\*' selects no layer.*unet\.mid_block"):
        train_layers({"unet": tiny_unet()}, ["unet.conv_in", "unet.midblock.*"])


def test_component_that_shall_train_and_has_no_layer_chosen_is_refused() -> None:
    modules = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    with pytest.raises(ConfigError, match=r"no layer of text_encoder.*training\.train_text_encoder=false"):
        train_layers(modules, ["unet.*"])
