"""The files of a folder in another folder too."""

import os
from pathlib import Path

import pytest

from lowmem_db.storage.mirroring import mirror


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "final"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_text("new")
    (folder / "index").write_text("{}")
    return folder


def files(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_files_are_in_both_folders_and_stored_once(model: Path) -> None:
    run = model.parent
    (run / "unet").mkdir()
    (run / "unet" / "old").write_text("old")
    (run / "own").write_text("own")
    for _ in range(2):
        mirror(model, run)
        assert files(run) == {
            "final/unet/weights": "new", "final/index": "{}", "unet/weights": "new", "index": "{}", "own": "own",
        }  # fmt: skip
        assert (run / "unet" / "weights").samefile(model / "unet" / "weights")


def test_disk_without_hard_links_gets_copies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    mirror(model, model.parent)
    assert files(model.parent)["unet/weights"] == "new"
    assert not (model.parent / "unet" / "weights").samefile(model / "unet" / "weights")
