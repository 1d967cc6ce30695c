"""The final model has checksums, which are checked when it is read."""

import shutil
from pathlib import Path

import pytest

from lowmem_db import api
from lowmem_db.engine.source import find_source
from lowmem_db.errors import LowmemDbError, StorageError
from lowmem_db.models.finding import find_model
from lowmem_db.storage.checksums import MANIFEST, check_folder


@pytest.fixture(scope="module")
def trained(tiny_model: Path, photos_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("final")
    config = api.load_config(overrides={
        "model.base": str(tiny_model), "subject.instance_dir": str(photos_dir), "subject.instance_prompt": "a zx dog",
        "prior.enabled": False, "output_dir": str(folder / "run"), "cache_dir": str(folder / "cache"), "device": "cpu",
        "data.resolution": 32, "training.max_train_steps": 1, "logging.tensorboard": False,
    })  # fmt: skip
    return api.train(config).root


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def test_every_file_has_a_checksum(trained: Path) -> None:
    assert check_folder(trained / "final")
    listed = (trained / "final" / MANIFEST).read_text()
    files = [file for file in (trained / "final").rglob("*") if file.is_file() and file.name != MANIFEST]
    assert all(f'"{file.relative_to(trained / "final").as_posix()}"' in listed for file in files)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_flipped_bit_is_found_when_the_component_is_read(trained: Path, tmp_path: Path, component: str) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (file,) = (run / "final" / component).glob("*.safetensors")
    flip(file)
    model = find_model(str(run / "final"))
    with pytest.raises(StorageError, match=rf"{file.name}: is damaged: its checksum is .* delete checksums\.json"):
        model.load(component)
    for layout in ("diffusers", "single-file"):
        with pytest.raises(LowmemDbError):
            api.export(run, tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()
    (run / "final" / MANIFEST).unlink()
    assert find_model(str(run / "final")).load(component)


def test_model_of_an_older_version_is_read_with_a_remark(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "final" / MANIFEST).unlink()
    find_source(str(run))
    assert "was written by an older version without checksums" in " ".join(capsys.readouterr().err.split())
