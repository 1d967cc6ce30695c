"""A file may suggest its base model; it never chooses one, fetches nothing, and consents to nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_db.adaptation.lora_file import LoraFile, read_lora, write_lora
from lowmem_db.errors import ModelError, NonFiniteError
from lowmem_db.models import finding
from lowmem_db.models.embedding_file import read_base, write_embedding
from lowmem_db.models.finding import find_model, find_suggested
from lowmem_db.models.new_words import NewWord
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.tensors import write_tensors

SETTINGS = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
NOTHING = SuggestedBase()
STATE = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2)}


def lora_of(base: SuggestedBase = NOTHING) -> LoraFile:
    return LoraFile(state=STATE, settings={"unet": SETTINGS}, base=base, metadata={})


def find(fields: dict[str, Any], key: str | None = None, given: str | None = None) -> Path:
    return find_suggested(SuggestedBase(fields=fields, key=key), of="dog is a LoRA", given=given).path


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(finding, name, lambda *_, **__: pytest.fail("something was fetched"))


def test_model_with_the_key_in_the_file_is_found(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    key = find_model(str(tiny_model)).base_key
    assert find({"base": str(copy)}, key) == copy
    (copy / "vae" / "other.json").write_text("{}")
    with pytest.raises(ModelError, match="a file alone does not choose a model: add --base"):
        find({"base": str(copy)}, key)


@pytest.mark.parametrize(
    "suggested",
    ["owner/name", "owner/name/file.safetensors", "//host/share", r"\\host\share", "/nowhere", "a 'b'; c", "x\0", ""],
)
def test_name_in_a_file_is_a_suggestion(suggested: str) -> None:
    with pytest.raises(ModelError, match=r"--base: dog is a LoRA that .*add --base"):
        find({"base": suggested, "allow_pickle": True}, "0" * 32)


def test_local_model_without_a_key_is_a_suggestion_too(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="add --base"):
        find({"base": str(tiny_model)})
    assert find({"base": "owner/name"}, given=str(tiny_model)) == tiny_model


def test_consent_in_a_file_is_not_read(tmp_path: Path) -> None:
    said = {"lowmem_db_base": json.dumps({"base": "demo", "allow_pickle": True, "cache_dir": "/"})}
    write_lora(tmp_path / "a", replace(lora_of(), metadata=said | {"lowmem_db_base_key": "k"}))
    found = read_lora(tmp_path / "a")
    assert found.base == SuggestedBase(fields={"base": "demo"}, key="k")
    assert found.settings == {"unet": SETTINGS}


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0}, {"r": "8"}, {"r": 10**9}, {"r": True}, {"lora_alpha": None}, {"lora_alpha": float("nan")},
        {"use_dora": "yes"}, {"lora_dropout": -1}, {"r": [1]}, {"use_rslora": 1},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_lora(tmp_path / "a", replace(lora_of(), settings={"unet": SETTINGS | fields}))
    with pytest.raises(ModelError, match="its metadata is damaged"):
        read_lora(tmp_path / "a")


def test_settings_that_this_program_does_not_write_are_left_out(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", replace(lora_of(), settings={"unet": SETTINGS | {"auto_mapping": {"x": "y"}}}))
    assert read_lora(tmp_path / "a").settings == {"unet": SETTINGS}


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, json.dumps({"unet": {}}), "{}"])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    write_tensors(tmp_path / "a", STATE, {"lora_adapter_metadata": text, "lowmem_db_base": text})
    with pytest.raises(ModelError, match="its metadata is damaged"):
        read_lora(tmp_path / "a")


def test_nan_is_refused(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", replace(lora_of(), state=STATE | {"unet.b.lora_A.weight": torch.tensor(float("nan"))}))
    with pytest.raises(NonFiniteError, match=r"a: unet\.b\.lora_A\.weight has values"):
        read_lora(tmp_path / "a")


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000])
def test_damaged_base_of_an_embedding_is_refused(tmp_path: Path, text: str) -> None:
    write_tensors(tmp_path / "a.safetensors", {"<z>": torch.ones(1, 4)}, {"lowmem_db_base": text})
    with pytest.raises(ModelError, match="its metadata is damaged"):
        read_base(tmp_path / "a.safetensors")


def test_an_embedding_says_as_much_as_a_lora(tmp_path: Path) -> None:
    word = NewWord(token="<z>", num_vectors=1, vectors={"text_encoder": torch.ones(1, 4)})
    said = SuggestedBase(fields={"base": "/home/a/model", "clip_skip": 2, "allow_pickle": True}, key="k")
    write_embedding(tmp_path / "a.safetensors", word, said)
    assert read_base(tmp_path / "a.safetensors").fields == {"base": "/home/a/model", "clip_skip": 2}


@pytest.mark.parametrize(
    ("base", "shared"), [("/home/a/dog.safetensors", "dog.safetensors"), ("owner/name", "owner/name"), ("", "")]
)
def test_file_that_is_shared_has_no_folder_of_its_owner(base: str, shared: str) -> None:
    assert SuggestedBase(fields={"base": base}, key="k").without_folders() == SuggestedBase(
        fields={"base": shared}, key="k"
    )
