"""Which builds of torch are refused beside which cards and drivers, and what is named instead."""

import pytest

from lowmem_db import nvidia, torch_build
from lowmem_db.nvidia import InstalledCard
from lowmem_db.torch_build import TorchBuild

RTX_3060 = InstalledCard("NVIDIA GeForce RTX 3060", (8, 6))
GTX_1080 = InstalledCard("NVIDIA GeForce GTX 1080", (6, 1))
RTX_5090 = InstalledCard("NVIDIA GeForce RTX 5090", (12, 0))
ON_CPU = TorchBuild("2.13.0+cpu", None)
WITH_CUDA_13 = TorchBuild("2.13.0+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"))


def machine(monkeypatch: pytest.MonkeyPatch, card: InstalledCard | None, driver: str | None) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvidia, "installed_cards", lambda: () if card is None else (card,))
    monkeypatch.setattr(nvidia, "driver_version", lambda: driver)


def test_machine_without_a_card_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, None, None)
    assert torch_build.why_no_cuda(ON_CPU) is None


def test_card_that_the_user_hides_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, RTX_3060, "580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert torch_build.why_no_cuda(ON_CPU) is None


@pytest.mark.parametrize(
    ("card", "driver", "index"),
    [
        (RTX_3060, "580.65.06", "cu130"),
        (RTX_3060, "566.36", "cu126"),
        (RTX_3060, None, "cu130"),
        (InstalledCard("NVIDIA GeForce RTX 3060"), "580.65.06", "cu130"),
        (GTX_1080, "580.65.06", "cu126"),
        (RTX_5090, "572.16", "cu128"),
    ],
)
def test_build_without_cuda_is_answered_with_the_line_to_install(
    monkeypatch: pytest.MonkeyPatch, card: InstalledCard, driver: str | None, index: str
) -> None:
    machine(monkeypatch, card, driver)
    reason = torch_build.why_no_cuda(ON_CPU)
    assert reason is not None
    assert f"torch 2.13.0+cpu is a build without CUDA, so {card.name} would not be used" in reason
    assert f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{index}" in reason


def test_driver_too_old_for_the_build_is_answered_with_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, RTX_3060, "535.183.01")
    reason = torch_build.why_no_cuda(WITH_CUDA_13)
    assert reason is not None
    assert "needs a driver of version 580 or later, but NVIDIA GeForce RTX 3060 has 535.183.01" in reason
    assert "nvidia.com/drivers" in reason
    assert reason.endswith("/cu126")


def test_driver_too_old_for_every_build_has_to_be_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, RTX_3060, "470.82")
    reason = torch_build.why_no_cuda(ON_CPU)
    assert reason is not None
    assert "update the driver to 525 or later" in reason
    assert "--index-url" not in reason


def test_cuda_that_does_not_start_is_not_blamed_on_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, RTX_3060, "580.65.06")
    reason = torch_build.why_no_cuda(WITH_CUDA_13)
    assert reason is not None
    assert "CUDA does not start" in reason
    assert "--gpus all" in reason
    assert "install" not in reason


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("sm_75", "sm_86"), (8, 6), True),
        (("sm_80",), (8, 9), True),  # machine code runs on later cards of its generation
        (("sm_86",), (8, 0), False),
        (("sm_75", "sm_80"), (6, 1), False),
        (("sm_90",), (12, 0), False),
        (("sm_90", "compute_90"), (12, 0), True),  # PTX is compiled by the driver
        (("sm_90a",), (9, 0), True),
        ((), (6, 1), True),
    ],
)
def test_code_for_a_card(architectures: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    build = TorchBuild("2.13.0", "13.0", architectures)
    assert build.supports(capability) is runs
    assert (torch_build.why_not_supported(build, InstalledCard("card", capability)) is None) is runs


def test_build_without_code_for_the_card_is_answered_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, GTX_1080, "580.65.06")
    reason = torch_build.why_not_supported(WITH_CUDA_13, GTX_1080)
    assert reason is not None
    assert "has no code for NVIDIA GeForce GTX 1080 (compute capability 6.1)" in reason
    assert reason.endswith("/cu126")


def test_installed_build_is_the_one_that_runs() -> None:
    import torch

    assert torch_build.installed().version == torch.__version__
    assert torch_build.installed().cuda == torch.version.cuda
