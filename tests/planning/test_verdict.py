"""The verdict of ``doctor`` on machines of several kinds."""

import pytest
import torch

from lowmem_db import environment, nvidia, torch_build
from lowmem_db.config import shipped
from lowmem_db.environment import GIB
from lowmem_db.nvidia import InstalledCard
from lowmem_db.planning.verdict import fitting, verdict


def card(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], free_gib: float) -> None:
    monkeypatch.setattr(nvidia, "installed_cards", lambda: (InstalledCard(name, capability),))
    monkeypatch.setattr(environment, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(environment, "free_bytes", lambda device: int(free_gib * GIB))
    monkeypatch.setattr(environment, "slow_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_card_is_told_what_fits_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "NVIDIA GeForce RTX 3060", (8, 6), 7.0)
    found = verdict()
    assert found.is_ready
    assert found.device == "NVIDIA GeForce RTX 3060, 7.0 GiB free"
    assert found.fits["sd15_full_8gb"] == pytest.approx(6.55)
    assert "sdxl_full_8gb" in found.fits
    assert "sdxl_full_12gb" not in found.fits


def test_card_without_bf16_is_told_what_computes_in_fp16() -> None:
    assert set(dict(fitting(14 * GIB, has_bf16=False))) == {"sd15_full_t4", "sdxl_lora_6gb"}


def test_every_configuration_for_a_card_of_one_size_is_known() -> None:
    every = {file.stem for file in shipped.CONFIGS.glob("*gb.yaml")}
    assert len(every) > 10
    assert every <= set(dict(fitting(100 * GIB, has_bf16=True)))
    assert not dict(fitting(GIB, has_bf16=True))


def test_missing_libraries_are_named_with_what_they_serve_and_the_line_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card(monkeypatch, "NVIDIA GeForce RTX 3060", (8, 6), 7.0)
    monkeypatch.setattr(environment, "is_installed", lambda name: name != "peft")
    assert verdict().missing == ('peft (LoRA and DoRA); pip install "lowmem-db[lora]"',)
    monkeypatch.setattr(environment, "is_installed", lambda name: name not in {"bitsandbytes", "xformers"})
    (missing,) = verdict().missing
    assert missing.startswith("bitsandbytes (int8 and NF4 base weights")


def test_slow_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "NVIDIA GeForce RTX 3060", (8, 6), 7.0)
    monkeypatch.setattr(environment, "slow_kernels", lambda device: "plain PyTorch computes noise")
    assert verdict().missing[0] == "compiled kernels: plain PyTorch computes noise"


def test_wrong_torch_is_not_ready_and_the_line_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvidia, "installed_cards", lambda: (InstalledCard("NVIDIA GeForce RTX 3060", (8, 6)),))
    monkeypatch.setattr(nvidia, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(torch_build, "installed", lambda: torch_build.TorchBuild("2.13.0+cpu", None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = verdict()
    assert not found.is_ready
    assert found.lines()[0].startswith("not ready: device: 'auto': torch 2.13.0+cpu is a build without CUDA")
    assert "--index-url https://download.pytorch.org/whl/cu130" in found.lines()[0]


def test_machine_without_a_card_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "installed_cards", lambda: ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = verdict()
    assert found.is_ready
    assert found.lines()[:2] == [
        "ready: the CPU; Stable Diffusion needs an NVIDIA card",
        "fits (predicted): demo",
    ]
