"""What the machine has, and what is said where it has it not."""

import json
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import lowmem_db_kernels
import psutil
import pytest
import torch
from lowmem_db_kernels import OperatorStatus

from lowmem_db import environment, torch_build
from lowmem_db.config.loading import load_config
from lowmem_db.environment import GIB
from lowmem_db.errors import BudgetError, ConfigError, DependencyError

NAMES = [library.name for library in environment.OPTIONAL_LIBRARIES]


@pytest.mark.parametrize("name", NAMES)
def test_missing_library_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError) as refused:
        environment.require(name)
    assert name in str(refused.value)
    assert 'pip install "lowmem-db[' in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [OSError("libcudart.so: cannot open"), RuntimeError("no\nCUDA"), ImportError("x")])
def test_library_that_does_not_load_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(environment.importlib, "import_module", fail)
    with pytest.raises(DependencyError) as refused:
        environment.require("bitsandbytes")
    assert str(error).split()[0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_extra_that_is_named_exists() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for library in environment.OPTIONAL_LIBRARIES:
        extra = library.install.partition("[")[2].partition("]")[0]
        found = re.search(rf"^{extra} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
        assert found is not None
        assert library.name.replace("_", "-") in found[1]


def test_back_ends_say_why_they_do_not_serve() -> None:
    found = {back_end["name"]: back_end for back_end in environment.back_ends()}
    assert list(found) == NAMES
    for back_end in found.values():
        assert back_end["reason"]
    if not torch.cuda.is_available():
        assert not found["xformers"]["active"]
        assert not found["triton"]["active"]


def test_library_that_is_not_installed_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "is_installed", lambda name: False)
    for back_end in environment.back_ends():
        assert not back_end["active"]
        assert "not installed" in back_end["reason"]


def test_versions_are_those_installed() -> None:
    versions = environment.versions()
    assert versions["torch"] == torch.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment.version_of("no-such-package-at-all") is None


def test_description_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDNN_CONV_WSCAP_DBG", "256")
    described = json.loads(json.dumps(environment.describe()))
    assert set(described) == {"versions", "platform", "devices", "variables"}
    assert described["variables"]["CUDNN_CONV_WSCAP_DBG"] == "256"
    assert described["devices"][0]["device"] == "cpu"
    assert described["devices"][0]["total_bytes"] > 1 << 28


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mps", "no support for Apple's GPUs: .*; use cpu"),
        ("xpu:0", "no support for Intel's GPUs: .*; use cpu"),
        ("rocm", "calls AMD's cards cuda; use cuda"),
        ("gpu", "use cuda"),
        ("cuda:x", "device: 'cuda:x' is not allowed: it must be auto, cpu, cuda"),
        ("toaster", "device: 'toaster' is not allowed: it must be auto, cpu, cuda"),
    ],
)
def test_other_devices_have_a_sentence_each(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        environment.resolve_device(name)
    with pytest.raises(ConfigError, match=said):
        load_config(None, [("device", name)])


@pytest.mark.parametrize(
    ("maker", "said"),
    [
        ("amd", "AMD's cards .* are not tested"),
        ("apple", "the CPU is used; there is no support for Apple's"),
        ("none", ""),
    ],
)
def test_gpus_of_other_makers_are_spoken_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, maker: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: maker == "amd")
    monkeypatch.setattr(torch.version, "hip", "6.4" if maker == "amd" else None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: maker == "apple")
    environment.resolve_device("auto")
    assert re.search(said, caplog.text) if said else not caplog.text


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_first_cuda_device_or_the_cpu(
    monkeypatch: pytest.MonkeyPatch, available: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(environment, "_check_card", lambda device: None)
    assert environment.resolve_device("auto") == torch.device(device)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_card_that_torch_cannot_use_is_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch_build, "why_no_cuda", lambda build: "torch 2 is a build without CUDA; install one")
    with pytest.raises(ConfigError, match=r"device: '.*torch 2 is a build without CUDA; install one; .*\bcpu\b"):
        environment.resolve_device(name)
    assert environment.resolve_device("cpu") == torch.device("cpu")


def test_card_that_torch_has_no_code_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    build = torch_build.TorchBuild("2.13.0+cu130", "13.0", ("sm_75", "sm_86", "sm_120"))
    monkeypatch.setattr(torch_build, "installed", lambda: build)
    with pytest.raises(ConfigError, match=r"device: 'cuda': torch 2\.13\.0\+cu130 has no code for .*GTX 1080.*/cu126"):
        environment.resolve_device("auto")


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:7")])
def test_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, count: int, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=rf"device: '{name}' does not exist; .* sees {count} CUDA devices"):
        environment.resolve_device(name)


@pytest.mark.parametrize(("name", "current"), [("cuda", []), ("cuda:0", [0]), ("cuda:1", [1])])
def test_device_that_is_there_is_taken_and_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, current: list[int]
) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(environment, "_check_card", lambda device: None)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", told.append, raising=False)
    assert environment.resolve_device(name) == torch.device(name)
    assert told == current


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two cards, the second of which is the current one; returns what torch is asked for their memory."""
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 3060", total_memory=12 * GIB, major=8, minor=6)
    asked = create_autospec(torch.cuda.mem_get_info, return_value=(10 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    return asked


def test_no_context_is_made_on_a_card_that_is_not_used(two_cards: Any) -> None:
    _, first, second = environment.devices()
    assert "free_bytes" not in first
    assert (second["free_bytes"], second["total_bytes"]) == (10 * GIB, 12 * GIB)
    two_cards.assert_called_once_with(1)


@pytest.mark.parametrize("answer", [(100 << 20, 12 * GIB), RuntimeError("CUDA error: out of memory\nCUDA kernel")])
def test_card_that_others_fill_is_refused(two_cards: Any, answer: Any) -> None:
    two_cards.side_effect = [answer]
    with pytest.raises(
        BudgetError, match=r"device: 'cuda:1': 0\.[01] GiB of 12\.0 GiB are free .*nvidia-smi"
    ) as raised:
        environment.check_room(torch.device("cuda:1"))
    assert raised.value.exit_code == 3


def test_card_with_room_is_taken_and_other_faults_are_told(two_cards: Any) -> None:
    environment.check_room(torch.device("cuda:1"))
    environment.check_room(torch.device("cpu"))
    two_cards.side_effect = RuntimeError("CUDA error: unspecified launch failure")
    with pytest.raises(RuntimeError, match="launch failure"):
        environment.check_room(torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("capability", "precision", "refused"),
    [((7, 5), "bf16", True), ((7, 5), "fp16", False), ((7, 5), "no", False), ((8, 0), "bf16", False)],
)
def test_bf16_is_refused_on_cards_without_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    if refused:
        with pytest.raises(
            ConfigError, match=r"Tesla T4 does not support 'bf16' in hardware; .* Use training\.mixed_precision=fp16"
        ):
            environment.check_precision(precision, torch.device("cuda"))
    else:
        environment.check_precision(precision, torch.device("cuda"))
    environment.check_precision("bf16", torch.device("cpu"))


def test_peak_of_the_process_is_what_the_system_says() -> None:
    peak = environment.peak_bytes(torch.device("cpu"))
    assert 0.9 * psutil.Process().memory_info().rss <= peak <= environment.total_host_bytes()
    assert environment.total_host_bytes() == pytest.approx(psutil.virtual_memory().total, rel=0.01)


def test_free_bytes_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    assert environment.free_disk_bytes(tmp_path / "a" / "b" / "c") > 0
    assert environment.free_disk_bytes(Path("a/b")) > 0


def test_libraries_are_quiet_but_for_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.NOTSET)
    environment.quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "error")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:1", "adamw8bit_step, noise (Triton cannot be imported); geglu (its self-test failed)"),
        ("cpu", "adamw8bit_step (Triton cannot be imported)"),
    ],
)
def test_slow_kernels_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch, device: str, said: str) -> None:
    asked = []

    def status(where: torch.device) -> list[OperatorStatus]:
        asked.append(where)
        return [
            OperatorStatus("adamw8bit_step", "eager", "Triton cannot be imported"),
            OperatorStatus("noise", "eager", "Triton cannot be imported"),
            OperatorStatus("geglu", "eager", "its self-test failed"),
            OperatorStatus("diffusion_loss", "triton", "LOWMEM_DB_KERNELS=auto"),
        ]

    monkeypatch.setattr(lowmem_db_kernels, "status", status)
    assert f"plain PyTorch, which is slower, computes {said};" in (environment.slow_kernels(torch.device(device)) or "")
    assert asked == [torch.device(device)]


def test_nothing_is_said_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowmem_db_kernels, "status", lambda where: [OperatorStatus("adamw8bit_step", "native", "")])
    assert environment.slow_kernels(torch.device("cpu")) is None


def test_kernels_are_asked_for_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(lowmem_db_kernels, "status", lambda where: asked.append(where) or [])
    environment.check_kernels(torch.device("cuda:1"))
    assert asked == [torch.device("cuda:1")]
