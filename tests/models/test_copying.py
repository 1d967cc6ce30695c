"""What is taken along into a trained model and an export: files of known kinds, and nothing from elsewhere."""

import shutil
from pathlib import Path

import pytest
import torch

from lowmem_db.errors import ModelError
from lowmem_db.exporting.diffusers_folder import export_diffusers
from lowmem_db.exporting.source import find_export_source
from lowmem_db.models.copying import copy_known_files
from lowmem_db.models.finding import find_model
from lowmem_db.models.saving import save_model

STRANGERS = ("code.py", "weights.pkl", "model.onnx", "run.sh", "noextension", ".hidden.json", "a.bin")


@pytest.fixture
def with_strangers(model_copy: Path) -> Path:
    for folder in (model_copy, model_copy / "vae", model_copy / "tokenizer"):
        for name in STRANGERS:
            (folder / name).write_text("import os")
    (model_copy / "vae" / "__pycache__").mkdir()
    return model_copy


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_strangers_are_left_out_and_named(
    with_strangers: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = find_model(str(with_strangers))
    save_model(made(tmp_path / "final"), source, {"unet": source.load("unet")}, dtype=torch.float32)
    export_diffusers(find_export_source(str(with_strangers)), tmp_path / "export")
    assert files(tmp_path / "final") == files(tmp_path / "export") == files(tiny_model)
    said = " ".join(capsys.readouterr().err.split())
    assert "not copied, because these are no configurations, vocabularies or safetensors: a.bin, code.py" in said


def test_link_out_of_the_model_is_not_followed(model_copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (model_copy / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    (model_copy / "tokenizer" / "special_tokens_map.json").symlink_to(secret)
    source = find_model(str(model_copy))
    with pytest.raises(ModelError, match=rf"special_tokens_map\.json: is a link that leads out .* to {secret}"):
        save_model(made(tmp_path / "final"), source, {}, dtype=torch.float32)
    with pytest.raises(ModelError, match="is a link that leads out"):
        export_diffusers(find_export_source(str(model_copy)), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_links_inside_a_model_and_in_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    (inside / "a").mkdir(parents=True)
    (inside / "one.json").write_text("{}")
    (inside / "a" / "two.json").symlink_to(Path("..") / "one.json")
    copy_known_files(inside / "a", tmp_path / "copy", root=inside)
    assert files(tmp_path / "copy") == {"two.json"}
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "vae").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text("{}")
    (snapshot / "vae" / "config.json").symlink_to(Path("../../../blobs/123"))
    copy_known_files(snapshot / "vae", tmp_path / "other", root=snapshot)
    assert files(tmp_path / "other") == {"config.json"}
    shutil.rmtree(tmp_path / "other")
    (snapshot / "vae" / "more.json").symlink_to(inside / "one.json")
    with pytest.raises(ModelError, match="is a link that leads out"):
        copy_known_files(snapshot / "vae", tmp_path / "other", root=snapshot)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder
