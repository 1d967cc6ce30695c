"""What leaves the machine tells neither whose it is nor where it lay, and holds no photo: all of it is searched."""

import base64
import json
import re
import shutil
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi, RepoUrl
from PIL import Image

import lowmem_db
from lowmem_db import environment
from lowmem_db.errors import ModelError, StorageError
from lowmem_db.storage import hub
from tests.cli.conftest import Run, run  # noqa: F401
from tests.original_models import write_original_model

SECRETS = ("zqpetra", "zqcellar", "zqpassport")  # user, machine, photos


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request, photos_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose paths, photos and base name their owner."""
    home = tmp_path_factory.mktemp("home") / "zqpetra"
    base = home / "zqpetra's models" / "base"
    write_original_model(base, "sd1")
    for file in (base / "unet/config.json", base / "vae/config.json", base / "tokenizer/tokenizer_config.json"):
        config = json.loads(file.read_text()) if file.is_file() else {}
        named = {"_name_or_path": str(base), "name_or_path": str(base)}
        file.write_text(json.dumps(config | named))
    photos = home / "zqpassport pictures"
    photos.mkdir()
    for number, photo in enumerate(sorted(photos_dir.glob("*.png"))):
        exif = Image.Exif()
        exif[0x013B] = "zqpetra"
        Image.open(photo).convert("RGB").save(photos / f"zqpassport{number}.jpg", exif=exif)
    fields = {
        "model.base": str(base),
        "subject.instance_dir": str(photos),
        "subject.instance_prompt": "a zx dog",
        "output_dir": str(home / "runs" / "dog"),
        "cache_dir": str(home / "cache"),
        "prior.enabled": False,
        "device": "cpu",
        "data.resolution": 32,
        "training.max_train_steps": 1,
        "sampling.prompts": ["a zx dog"],
        "sampling.num_images": 1,
        "sampling.num_inference_steps": 1,
        "logging.tensorboard": False,
        "final.hub_model_id": None,
        "lora.enabled": request.param == "lora",
    }
    return lowmem_db.train(lowmem_db.load_config(overrides=fields)).root


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub with the methods of the real one, and the folder that it keeps uploads in."""
    folder = tmp_path / "hub"
    api = create_autospec(HfApi, instance=True)
    api.create_repo.side_effect = lambda name, **options: RepoUrl(f"https://huggingface.co/{name}")
    api.upload_folder.side_effect = lambda **call: shutil.copytree(call["folder_path"], folder / call["repo_id"])
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    return folder


def search(folder: Path, run_root: Path) -> None:
    """Search every file for secrets, as they are and in base64, and for metadata of cameras."""
    home = run_root.parent.parent
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        for picture in re.findall(rb"data:image/\w+;base64,([A-Za-z0-9+/=]+)", content):
            content += base64.b64decode(picture)
        for secret in (*SECRETS, str(home), str(home.parent), str(Path.home()), "Exif\0"):
            assert secret.encode() not in content, (file.name, secret)
            assert json.dumps(secret)[1:-1].encode() not in content.lower(), (file.name, secret)


def test_published_model_tells_nothing_and_has_a_card_with_samples(trained: Path, sent: Path) -> None:
    before = {file: file.read_bytes() for file in (trained / "final").rglob("*") if file.is_file()}
    listed = lowmem_db.api.files_to_publish(trained)
    assert lowmem_db.publish(trained, "someone/dog") == "https://huggingface.co/someone/dog"
    there = sent / "someone/dog"
    assert {file.relative_to(there).as_posix() for file in there.rglob("*") if file.is_file()} == set(listed)
    assert {"README.md", "samples.jpg"} < set(listed)
    assert "![one row for each prompt below](samples.jpg)" in (there / "README.md").read_text()
    search(there, trained)
    assert {file: file.read_bytes() for file in before} == before  # the final model itself is as it was
    assert not list(trained.glob(".sharing-*"))


def test_exported_file_tells_nothing_and_carries_thumbnail_and_trigger_words(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lowmem_db.export(trained, tmp_path / "out" / "dog.safetensors")
    search(tmp_path / "out", trained)
    header = (tmp_path / "out" / "dog.safetensors").read_bytes()[8:200_000]
    metadata = json.JSONDecoder().raw_decode(header.decode(errors="replace"))[0]["__metadata__"]
    assert metadata["modelspec.trigger_phrase"] == "a zx dog"
    picture = metadata["modelspec.thumbnail"].removeprefix("data:image/jpeg;base64,")
    (tmp_path / "thumbnail.jpg").write_bytes(base64.b64decode(picture))
    with Image.open(tmp_path / "thumbnail.jpg") as thumbnail:
        assert thumbnail.size == (32, 32)


def test_shared_report_tells_nothing(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    page = lowmem_db.report(trained, tmp_path / "out" / "report.html", share=True)
    search(tmp_path / "out", trained)
    assert page.read_text().count("data:image/jpeg") == 1  # the sample, and no photo


def test_versions_tell_nothing() -> None:
    described = json.dumps(environment.describe())
    assert str(Path.home()) not in described


def test_file_that_names_a_folder_is_not_sent(trained: Path, sent: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    card = copy / "final" / "README.md"
    card.write_text(card.read_text() + f"\nmade in {trained}\n")
    with pytest.raises(StorageError, match=r"README\.md: names .*, a folder of this machine, so nothing is sent"):
        lowmem_db.publish(copy, "someone/dog")
    assert not sent.exists()


def test_command_lists_and_asks(trained: Path, sent: Path, run: Run) -> None:  # noqa: F811
    asked = run("publish", trained, "someone/dog")
    assert (asked.code, asked.out) == (2, "")
    assert "README.md" in asked.err
    assert "to https://huggingface.co/someone/dog" in asked.err
    assert "--yes: is missing and nobody can be asked here" in asked.err
    assert not sent.exists()
    assert run("publish", trained, "someone/dog", "--yes").out == "https://huggingface.co/someone/dog\n"
    assert run("publish", trained, "dog", "--yes").err.startswith("error: OWNER/NAME: 'dog' is not allowed")


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="has no final model"):
        lowmem_db.publish(tmp_path, "someone/dog")
