"""Fixtures: the archive unpacked where commands are given, and a command in this process."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.before.records import ARCHIVE, RECORD
from tests.cli.conftest import run as run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LOWMEM_DB_CACHE", str(tmp_path / "of_the_user"))
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture(scope="session")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())
