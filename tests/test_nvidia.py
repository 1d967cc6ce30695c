"""What the driver says, and that nothing is said where there is none."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem_db import nvidia
from lowmem_db.errors import ConfigError


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(nvidia, "_DRIVER_FOLDER", tmp_path)
    monkeypatch.setattr(nvidia.shutil, "which", lambda name, path=None: None)
    for cached in (nvidia.driver_version, nvidia.installed_cards):
        cached.cache_clear()
    yield
    for cached in (nvidia.driver_version, nvidia.installed_cards):
        cached.cache_clear()


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

    monkeypatch.setattr(nvidia.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(nvidia.subprocess, "run", run)
    assert nvidia.driver_version() == "566.36"
    nvidia.driver_version.cache_clear()
    monkeypatch.setattr(nvidia.subprocess, "run", fail)
    assert nvidia.driver_version() is None


def answers(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    """Let ``nvidia-smi`` answer to some fields, and fail for others."""

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        fields = command[1].removeprefix("--query-gpu=")
        if fields not in answers:
            raise subprocess.CalledProcessError(2, command)
        return subprocess.CompletedProcess(command, 0, answers[fields])

    monkeypatch.setattr(nvidia.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(nvidia.subprocess, "run", run)


def test_no_cards() -> None:
    assert nvidia.installed_cards() == ()


def test_cards_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"name,compute_cap": "NVIDIA GeForce RTX 3060, 8.6\nTesla T4, 7.5\n"})
    found = nvidia.installed_cards()
    assert [(card.name, card.capability) for card in found] == [
        ("NVIDIA GeForce RTX 3060", (8, 6)),
        ("Tesla T4", (7, 5)),
    ]


def test_lanes_are_those_of_the_card_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = "pci.bus_id,pcie.link.gen.max,pcie.link.width.current"
    places = ("0A:00.0, 4, 16", "41:00.0, 3, 4", "42:00.0, [N/A], [N/A]", "44:00.0, 0, 0", "45:00.0, 3, 0")
    answers(monkeypatch, {fields: "".join(f"00000000:{place}\n" for place in places)})
    assert [nvidia.pcie_link(0, bus, 0) for bus in (0x0A, 0x41)] == [(4, 16), (3, 4)]
    assert [nvidia.pcie_link(0, bus, 0) for bus in (0x42, 0x43, 0x44, 0x45)] == [None] * 4


def test_old_driver_tells_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"name": "GeForce GTX 1080\n"})
    assert nvidia.installed_cards() == (nvidia.InstalledCard("GeForce GTX 1080"),)


def test_cards_of_a_driver_whose_program_is_missing_or_broken(tmp_path: Path) -> None:
    folder = tmp_path / "gpus" / "0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA GeForce RTX 3060\nIRQ:   \t\t 140\n")
    assert nvidia.installed_cards() == (nvidia.InstalledCard("NVIDIA GeForce RTX 3060"),)


@pytest.mark.parametrize(("visible", "hidden"), [(None, False), ("", True), ("-1", True), ("0", False), ("1,0", False)])
def test_cards_may_be_hidden(monkeypatch: pytest.MonkeyPatch, visible: str | None, hidden: bool) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia.are_hidden() is hidden


def variables(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("platform", "expandable"), [("linux", True), ("win32", False)])
def test_variables_are_set_where_the_platform_has_them(
    monkeypatch: pytest.MonkeyPatch, platform: str, expandable: bool
) -> None:
    variables(monkeypatch)
    monkeypatch.setattr(nvidia.sys, "platform", platform)
    nvidia.set_variables()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert ("PYTORCH_CUDA_ALLOC_CONF" in os.environ) is ("PYTORCH_ALLOC_CONF" in os.environ) is expandable
    assert nvidia.has_expandable_segments() is expandable
    nvidia.check_variables()


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, CUBLAS_WORKSPACE_CONFIG=":16:8", PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")
    nvidia.set_variables()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert not nvidia.has_expandable_segments()
    nvidia.check_variables()


@pytest.mark.parametrize("values", [{"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, {}])
def test_workspace_that_lets_bits_change_is_refused(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    variables(monkeypatch, **values)
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG: .* allowed: :4096:8, :16:8"):
        nvidia.check_variables()


@pytest.mark.parametrize("module", ["lowmem_db.api", "lowmem_db.cli.commands"])
def test_they_are_set_before_torch_is_imported(module: str) -> None:
    run = "" if module.endswith("api") else "sys.argv = ['lowmem-db', '--help']; import contextlib\n"
    call = "" if not run else "with contextlib.suppress(SystemExit): lowmem_db.cli.commands.run_command()\n"
    code = (
        f"import os, sys\n{run}import {module}\n{call}"
        "assert 'torch' not in sys.modules\nprint(os.environ['CUBLAS_WORKSPACE_CONFIG'], file=sys.stderr)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUBLAS", "PYTORCH"))}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ":4096:8"
