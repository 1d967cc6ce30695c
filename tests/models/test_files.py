"""What a folder's files say without their weights being loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowmem_db.errors import ModelError
from lowmem_db.models.files import ModelFiles


def test_numbered_parts_are_added_up_and_other_forms_are_not(tmp_path: Path) -> None:
    for number, size in ((1, 5), (2, 7)):
        (tmp_path / "text_encoder").mkdir(exist_ok=True)
        save_file({"w": torch.zeros(size)}, tmp_path / "text_encoder" / f"model-0000{number}-of-00002.safetensors")
    save_file({"w": torch.zeros(11)}, tmp_path / "text_encoder" / "model.fp16.safetensors")
    assert ModelFiles(path=tmp_path).num_parameters("text_encoder") == 12


def test_configurations_have_the_names_of_their_libraries(tmp_path: Path) -> None:
    names = {"scheduler": "scheduler_config", "tokenizer_2": "tokenizer_config", "text_encoder": "config"}
    for component, name in names.items():
        (tmp_path / component).mkdir()
        (tmp_path / component / f"{name}.json").write_text(f'{{"of": "{component}"}}')
    files = ModelFiles(path=tmp_path)
    assert all(files.config_of(component) == {"of": component} for component in names)


def test_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"unet/config\.json: is missing"):
        ModelFiles(path=tmp_path).config_of("unet")


def test_key_depends_on_the_order_of_the_components(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    files = ModelFiles(path=tmp_path)
    assert files.content_key("a", "b") != files.content_key("b", "a")
