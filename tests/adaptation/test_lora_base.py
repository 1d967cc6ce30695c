"""A LoRA's file may suggest its base model; it never chooses one, fetches nothing, and consents to nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_db.adaptation.lora_base import find_base
from lowmem_db.adaptation.lora_file import LoraFile, read_lora, write_lora
from lowmem_db.errors import ModelError, NonFiniteError
from lowmem_db.models import finding
from lowmem_db.models.finding import find_model
from lowmem_db.storage.tensors import write_tensors

SETTINGS = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
STATE = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2)}


def lora_of(base: dict[str, Any], key: str | None = None) -> LoraFile:
    return LoraFile(state=STATE, settings={"unet": SETTINGS}, base=base, base_key=key, metadata={})


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(finding, name, lambda *_, **__: pytest.fail("something was fetched"))


def test_model_with_the_key_in_the_file_is_found(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    lora = lora_of({"base": str(copy)}, find_model(str(tiny_model)).whole_key)
    assert find_base(lora, source="dog", given=None).path == copy
    (copy / "vae" / "other.json").write_text("{}")
    with pytest.raises(ModelError, match="a file alone does not choose a model: add --base"):
        find_base(lora, source="dog", given=None)


@pytest.mark.parametrize(
    "suggested",
    ["owner/name", "owner/name/file.safetensors", "//host/share", r"\\host\share", "/nowhere", "a 'b'; c", "x\0", ""],
)
def test_name_in_a_file_is_a_suggestion(suggested: str) -> None:
    with pytest.raises(ModelError, match=r"--base: dog is a LoRA that .*add --base"):
        find_base(lora_of({"base": suggested, "allow_pickle": True}, "0" * 32), source="dog", given=None)


def test_local_model_without_a_key_is_a_suggestion_too(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="add --base"):
        find_base(lora_of({"base": str(tiny_model)}), source="dog", given=None)
    assert find_base(lora_of({"base": "owner/name"}), source="dog", given=str(tiny_model)).path == tiny_model


def test_consent_in_a_file_is_not_read(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", lora_of({"base": "demo", "allow_pickle": True, "cache_dir": "/"}, "k"))
    found = read_lora(tmp_path / "a")
    assert found.base == {"base": "demo"}
    assert found.base_key == "k"
    assert found.settings == {"unet": SETTINGS}


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0}, {"r": "8"}, {"r": 10**9}, {"r": True}, {"lora_alpha": None}, {"lora_alpha": float("nan")},
        {"use_dora": "yes"}, {"lora_dropout": -1}, {"r": [1]}, {"use_rslora": 1},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_lora(tmp_path / "a", replace(lora_of({}), settings={"unet": SETTINGS | fields}))
    with pytest.raises(ModelError, match="its metadata is damaged"):
        read_lora(tmp_path / "a")


def test_settings_that_this_program_does_not_write_are_left_out(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", replace(lora_of({}), settings={"unet": SETTINGS | {"auto_mapping": {"x": "y"}}}))
    assert read_lora(tmp_path / "a").settings == {"unet": SETTINGS}


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, json.dumps({"unet": {}}), "{}"])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    write_tensors(tmp_path / "a", STATE, {"lora_adapter_metadata": text, "lowmem_db_base": text})
    with pytest.raises(ModelError, match="its metadata is damaged"):
        read_lora(tmp_path / "a")


def test_nan_is_refused(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", replace(lora_of({}), state=STATE | {"unet.b.lora_A.weight": torch.tensor(float("nan"))}))
    with pytest.raises(NonFiniteError, match=r"a: unet\.b\.lora_A\.weight has values"):
        read_lora(tmp_path / "a")
