"""Uploading is checked before a run, and a failed upload leaves the model and says how to try again."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, RepoUrl

from lowmem_db.cli.train import train
from lowmem_db.errors import StorageError
from lowmem_db.storage import hub


class FakeHub:
    """Stands for the hub's API."""

    logged_in = True
    full = False
    uploaded: tuple[str, set[str]] | None = None

    def whoami(self) -> dict[str, str]:
        if not self.logged_in:
            raise hub.LocalTokenNotFoundError("Token is required")
        return {"name": "someone"}

    def create_repo(self, model_id: str, *, private: bool, exist_ok: bool) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{model_id if '/' in model_id else 'someone/' + model_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.full:
            raise OSError("no space on the hub")
        FakeHub.uploaded = (repo_id, {file.name for file in folder_path.iterdir()})


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "uploaded", None)
    return FakeHub


def arguments(fields: dict[str, object]) -> list[str]:
    return [f"{field}={json.dumps(value)}" for field, value in (fields | {"final.push_to_hub": True}).items()]


def test_finished_model_is_uploaded(fake_hub: type[FakeHub], tiny_fields: dict[str, object], tmp_path: Path) -> None:
    train(arguments(tiny_fields))
    assert fake_hub.uploaded is not None
    repository, names = fake_hub.uploaded
    assert repository == "someone/run"
    assert names == {file.name for file in (tmp_path / "run" / "final").iterdir()} - {"checksums.json"}


def test_missing_login_is_reported_before_the_run(
    fake_hub: type[FakeHub], tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeHub, "logged_in", False)
    with pytest.raises(StorageError, match="hf auth login"):
        train(arguments(tiny_fields))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_failed_upload_leaves_the_model(
    fake_hub: type[FakeHub], tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeHub, "full", True)
    with pytest.raises(StorageError, match=r"hf upload .*final"):
        train(arguments(tiny_fields | {"final.hub_model_id": "someone/teapot"}))
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()


def test_unreachable_hub_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_none"))
    with pytest.raises(StorageError, match=r"final\.push_to_hub: true, but there is no login for the hub \(.+\)"):
        hub.check_login()
