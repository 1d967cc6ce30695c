"""What NVIDIA's libraries are told before torch loads them, and what the driver of this machine says; without torch."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowmem_db.errors import ConfigError

_DRIVER_FOLDER = Path("/proc/driver/nvidia")
_WSL_FOLDER = Path("/usr/lib/wsl/lib")
_PROGRAM = "nvidia-smi"
_SECONDS = 20
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name since torch 2.9, and the one before it."""
_EXPANDABLE = "expandable_segments:True"
_RECORDED = (_CUBLAS, "CUDNN_CONV_WSCAP_DBG", *_ALLOCATOR)


def set_variables() -> None:
    """Let cuBLAS compute the same bits each time, and let the allocator grow its segments; before torch is imported.

    What the user has set stays. Windows has no expandable segments.
    """
    os.environ.setdefault(_CUBLAS, _DETERMINISTIC_WORKSPACES[0])
    if sys.platform != "win32" and not any(name in os.environ for name in _ALLOCATOR):
        os.environ.update(dict.fromkeys(_ALLOCATOR, _EXPANDABLE))


def check_variables() -> None:
    """Refuse a setting of cuBLAS under which two equal steps may end with different bits.

    Raises:
        ConfigError: It is set to something else; the message says what is allowed.
    """
    found = os.environ.get(_CUBLAS)
    if found not in _DETERMINISTIC_WORKSPACES:
        said = "is not set" if found is None else f"{found!r} lets results change from run to run"
        raise ConfigError(
            f"{_CUBLAS}: {said}; allowed: {', '.join(_DETERMINISTIC_WORKSPACES)}. Set it before Python starts, or "
            "import lowmem_db.api before anything computes"
        )


def variables() -> dict[str, str]:
    """Return what is set of the variables that decide which algorithms NVIDIA's libraries have the memory for.

    Where a workspace cannot be had, cuDNN takes an algorithm with a smaller one, whose last bits may differ;
    ``CUDNN_CONV_WSCAP_DBG`` limits the workspaces from the start, in MiB.
    """
    return {name: os.environ[name] for name in _RECORDED if name in os.environ}


def has_expandable_segments() -> bool:
    """Say whether the allocator of a run here grows its segments, which leaves fewer gaps between tensors."""
    settings = next((os.environ[name] for name in _ALLOCATOR if name in os.environ), _EXPANDABLE)
    return sys.platform != "win32" and _EXPANDABLE in settings


def allocator_settings() -> str:
    """Return what the allocator of a run here is told, in the form of ``PYTORCH_ALLOC_CONF``."""
    given = next((os.environ[name] for name in _ALLOCATOR if os.environ.get(name)), "")
    segments = f"expandable_segments:{has_expandable_segments()}"
    return given if "expandable_segments" in given else ",".join(filter(None, (given, segments)))


@dataclass(frozen=True)
class InstalledCard:
    """A card in this machine, as its driver knows it; torch may or may not be able to use it.

    Attributes:
        name: Its name.
        capability: CUDA compute capability, or None if the driver does not tell.
    """

    name: str
    capability: tuple[int, int] | None = None


@cache
def installed_cards() -> tuple[InstalledCard, ...]:
    """Return the cards that the driver of this machine sees, whatever torch sees."""
    if answer := _ask("name,compute_cap"):
        return tuple(_card_of(line) for line in answer)
    if answer := _ask("name"):  # drivers before 510 do not know the other field
        return tuple(InstalledCard(line) for line in answer)
    files = sorted(_DRIVER_FOLDER.glob("gpus/*/information"))
    return tuple(InstalledCard(_model_in(file)) for file in files)


def pcie_link(domain: int, bus: int, slot: int) -> tuple[int, int] | None:
    """Return the PCIe generation and the lanes of the card at a place, or None if its driver does not tell.

    A card at rest may lower its generation, so that the highest one of card and slot is asked for, but not its lanes.
    Some virtual machines answer 0.
    """
    for line in _ask("pci.bus_id,pcie.link.gen.max,pcie.link.width.current"):
        place, *link = line.lower().split(", ")
        if place == f"{domain:08x}:{bus:02x}:{slot:02x}.0" and all(text.isdecimal() for text in link):
            generation, lanes = map(int, link)
            return (generation, lanes) if generation and lanes else None
    return None


def _card_of(line: str) -> InstalledCard:
    name, _, capability = line.rpartition(", ")
    major, _, minor = capability.partition(".")
    return InstalledCard(name, (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None)


def _model_in(file: Path) -> str:
    found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return "an NVIDIA card" if found is None else found[1]


def are_hidden() -> bool:
    """Say whether the user hides all cards from CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and (not visible.strip() or visible.strip().startswith("-"))


@cache
def driver_version() -> str | None:
    """Return the version of the driver, or None where there is no card, or its driver does not answer."""
    file = _DRIVER_FOLDER / "version"
    if file.is_file():
        found = re.search(r"\b\d+\.\d+(\.\d+)*\b", file.read_text(encoding="utf-8", errors="replace"))
        return None if found is None else found[0]
    return next(iter(_ask("driver_version")), None)


def _ask(fields: str) -> list[str]:
    """Return what ``nvidia-smi`` says of each card, a line for each; nothing where it is missing or fails."""
    program = shutil.which(_PROGRAM) or shutil.which(_PROGRAM, path=str(_WSL_FOLDER))
    if program is None:
        return []
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()]


def is_in_wsl() -> bool:
    """Say whether this is Linux inside Windows, whose driver is that of Windows."""
    return sys.platform == "linux" and _WSL_FOLDER.is_dir()
