"""What the driver says, and that nothing is said where there is none."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem_db import nvidia


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(nvidia, "_VERSION_FILE", tmp_path / "version")
    monkeypatch.setattr(nvidia.shutil, "which", lambda name: None)
    nvidia.driver_version.cache_clear()
    yield
    nvidia.driver_version.cache_clear()


def test_no_driver() -> None:
    assert nvidia.driver_version() is None


def test_version_stands_in_the_file_of_the_kernel_module(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC 12\n")
    assert nvidia.driver_version() == "580.65.06"


@pytest.mark.parametrize("error", [OSError("no"), subprocess.CalledProcessError(9, "nvidia-smi")])
def test_program_is_asked_where_there_is_no_file(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, "566.36\n566.36\n")

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(nvidia.shutil, "which", lambda name: name)
    monkeypatch.setattr(nvidia.subprocess, "run", run)
    assert nvidia.driver_version() == "566.36"
    nvidia.driver_version.cache_clear()
    monkeypatch.setattr(nvidia.subprocess, "run", fail)
    assert nvidia.driver_version() is None
