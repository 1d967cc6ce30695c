"""Configurations that make no sense, or that would fetch or run code, are refused in one line, without weights."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from lowmem_db.errors import LowmemDbError, ModelError
from lowmem_db.models.configurations import check_values, own_fields
from lowmem_db.models.finding import find_model

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

FILES = {
    "unet": "config.json", "text_encoder": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json",
}  # fmt: skip
NEEDED = {
    "unet": ("block_out_channels", "cross_attention_dim", "sample_size", "down_block_types", "layers_per_block"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size"),
    "vae": ("block_out_channels", "latent_channels", "_class_name", "down_block_types"),
    "scheduler": ("beta_schedule", "num_train_timesteps", "beta_start", "prediction_type"),
}
ODD_VALUES = (
    None, True, 0, -1, 1 << 40, 10**30, 0.5, float("nan"), float("inf"), "", "dog", "\x1b[31m", "[bold]", [], [0], {},
    [[[[1]]]], ["dog"], [1] * 1000, {"a": {"b": {"c": {"d": 1}}}}, "8" * 10_000,
)  # fmt: skip
WHOLE = ("{}", "[]", "3", "null", '"dog"', "", "{", "\0", "[" * 100_000, '{"a": ' * 50_000, "\ufeff{}", "{'a': 1}")
FOREIGN = (
    {"quantization_config": {"quant_method": "nf4"}}, {"quantization_config": {"quant_method": "owner/x"}},
    {"auto_map": {"AutoModel": "owner/name--code.Model"}}, {"quantization_config": []}, {"custom_pipeline": "owner/x"},
)  # fmt: skip


def one_value() -> Iterator[tuple[str, str, Any]]:
    """Yield a component, one of the keys it needs, and an odd value."""
    for component, keys in NEEDED.items():
        for key in keys:
            yield from ((component, key, value) for value in ODD_VALUES)


ONE_VALUE = list(one_value())
chance = random.Random(14)
QUICK = [ONE_VALUE[index] for index in sorted(chance.sample(range(len(ONE_VALUE)), 60))]


@pytest.fixture(scope="module")
def damaged(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("damaged") / "model"))


def refusal_of(model: Path, tiny_model: Path, component: str, text: str) -> str | None:
    """Return what a model with another configuration is refused with, or None if it is not."""
    file = model / component / FILES[component]
    file.write_text(text)
    try:
        for weights in (False, True):
            find_model(str(model), weights=weights)
    except LowmemDbError as refused:
        return str(refused)
    finally:
        shutil.copyfile(tiny_model / component / FILES[component], file)
    return None


def assert_line(message: str) -> None:
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1000
    assert "Traceback" not in message


def check_one(component: str, key: str, value: Any, damaged: Path, tiny_model: Path) -> None:
    whole = json.loads((tiny_model / component / FILES[component]).read_text())
    message = refusal_of(damaged, tiny_model, component, json.dumps(whole | {key: value}))
    if message is not None:
        assert_line(message)
    elif component != "scheduler":  # what is not refused is what the weights belong to
        assert find_model(str(damaged)).load(component)


def test_odd_values_are_refused(damaged: Path, tiny_model: Path) -> None:
    for component, key, value in QUICK:
        check_one(component, key, value, damaged, tiny_model)


@pytest.mark.slow
def test_all_odd_values_are_refused(damaged: Path, tiny_model: Path) -> None:
    assert len(ONE_VALUE) >= 300
    for component, key, value in ONE_VALUE:
        check_one(component, key, value, damaged, tiny_model)


@pytest.mark.parametrize("component", FILES)
def test_text_that_is_no_configuration_is_refused(damaged: Path, tiny_model: Path, component: str) -> None:
    for text in WHOLE:
        message = refusal_of(damaged, tiny_model, component, text)
        if component != "scheduler" or text != "{}":  # all of a schedule's fields have usual values
            assert message is not None, text[:20]
            assert_line(message)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_foreign_code_is_refused(damaged: Path, tiny_model: Path, component: str) -> None:
    whole = json.loads((tiny_model / component / "config.json").read_text())
    for fields in FOREIGN:
        message = refusal_of(damaged, tiny_model, component, json.dumps(whole | fields))
        assert message is not None, fields
        assert f"{next(iter(fields))} is " in message
        assert_line(message)


def test_special_tokens_are_fields_of_the_network() -> None:
    """transformers 4 lists them in the library's class too; 5 does not."""

    class PretrainedConfig:
        def __init__(self, torchscript: bool = False, eos_token_id: int | None = None) -> None: ...

    class OfANetwork(PretrainedConfig):
        def __init__(self, hidden_size: int = 8, eos_token_id: int = 49407, torchscript: bool = False) -> None: ...

    given = {"hidden_size": 16, "eos_token_id": 513, "torchscript": True, "auto_map": {}}
    assert own_fields(OfANetwork, given) == {"hidden_size": 16, "eos_token_id": 513}


def test_fields_of_the_library_are_not_used(damaged: Path, tiny_model: Path) -> None:
    file = damaged / "text_encoder" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"_attn_implementation": "owner/repository", "attn_implementation": "a/b"}))
    try:
        loaded = find_model(str(damaged)).load("text_encoder")
    finally:
        shutil.copyfile(tiny_model / "text_encoder" / "config.json", file)
    assert "/" not in str(loaded.config._attn_implementation)
    assert set(own_fields(CLIPTextConfig, fields | {"_attn_implementation": "x", "use_kernels": True})) <= {
        "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range",
        "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id", "architectures",
    }  # fmt: skip


def test_configurations_of_published_models_pass() -> None:
    for file in sorted(Path("lowmem_db/models/configs").rglob("config.json")):
        check_values(json.loads(file.read_text()), file)


def test_weights_in_8_bit_floats_are_read(damaged: Path, tiny_model: Path) -> None:
    file = damaged / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in load_file(file).items()}, file, {"format": "pt"})
    try:
        assert find_model(str(damaged)).load("vae").dtype == torch.float32
    finally:
        shutil.copyfile(tiny_model / "vae" / file.name, file)


def test_long_values_are_shortened() -> None:
    with pytest.raises(ModelError, match=r"a is \[1, 1, .*\.\.\., too long or too deep"):
        check_values({"a": [1] * 10_000}, Path("config.json"))
