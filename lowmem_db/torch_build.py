"""Whether the installed build of torch can use the card in this machine, and if not, what to install instead."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_db import nvidia
from lowmem_db.nvidia import InstalledCard

_INDEX = "https://download.pytorch.org/whl/"
_FIRST_DRIVERS = {13: 580, 12: 525, 11: 450}
"""The oldest driver for each major version of CUDA; within one, newer builds run with older drivers."""
_FIRST_WITH_CUDA_13 = (7, 5)
_FIRST_WITH_CUDA_12_8 = (10, 0)


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was built for.

    Attributes:
        version: Its version.
        cuda: The version of CUDA it was built with, or None for a build without.
        architectures: What it has code for, such as ``sm_86`` and ``compute_90``.
    """

    version: str
    cuda: str | None
    architectures: tuple[str, ...] = ()

    def supports(self, capability: tuple[int, int]) -> bool:
        """Return whether it has code that a card can run; True if the build does not tell what it has."""
        return not self.architectures or any(_runs_on(name, capability) for name in self.architectures)


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether machine code (of the same generation) or PTX (of any later one) runs on a card."""
    kind, _, digits = architecture.partition("_")
    digits = digits.rstrip("af")
    if len(digits) < 2 or not digits.isdecimal():
        return False
    built = int(digits[:-1]), int(digits[-1])
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def installed() -> TorchBuild:
    """Return what the installed torch was built for."""
    import torch

    architectures = tuple(torch.cuda.get_arch_list()) if torch.cuda.is_available() else ()
    return TorchBuild(torch.__version__, torch.version.cuda, architectures)


def why_no_cuda(build: TorchBuild) -> str | None:
    """Say why torch sees none of the NVIDIA cards in this machine, and the way out.

    Args:
        build: The installed torch, which sees no CUDA device.

    Returns:
        None if there is no card, or the user hides it.
    """
    cards = () if nvidia.are_hidden() else nvidia.installed_cards()
    if not cards:
        return None
    name, driver = cards[0].name, nvidia.driver_version()
    if build.cuda is None:
        return f"torch {build.version} is a build without CUDA, so {name} would not be used; {install_line(cards)}"
    if driver is not None and _major(driver) < (needed := _FIRST_DRIVERS.get(_major(build.cuda), 0)):
        return (
            f"torch {build.version} needs a driver of version {needed} or later, but {name} has {driver}; update the "
            f"driver (https://www.nvidia.com/drivers), or {install_line(cards)}"
        )
    return (
        f"CUDA does not start on {name} (driver {driver or 'unknown'}, torch {build.version}); check that nvidia-smi "
        "shows the card: restart after an update of the driver, start a container with --gpus all"
    )


def why_not_supported(build: TorchBuild, card: InstalledCard) -> str | None:
    """Say why a build has no code for a card, and what to install instead; None if it has."""
    if card.capability is None or build.supports(card.capability):
        return None
    capability = ".".join(map(str, card.capability))
    return (
        f"torch {build.version} has no code for {card.name} (compute capability {capability}); {install_line([card])}"
    )


def install_line(cards: Sequence[InstalledCard]) -> str:
    """Return how to install a build of torch that the driver and the first card support."""
    index = _index_for(cards[0].capability, nvidia.driver_version())
    if index is None:
        oldest = _FIRST_DRIVERS[12]
        return f"update the driver to {oldest} or later (https://www.nvidia.com/drivers), then install torch"
    python = "python" if sys.platform == "win32" else "python3"
    return f"install one with CUDA: {python} -m pip install --force-reinstall torch --index-url {_INDEX}{index}"


def _index_for(capability: tuple[int, int] | None, driver: str | None) -> str | None:
    """Return the name of PyTorch's index for a card and a driver; None if no build runs with the driver."""
    version = _FIRST_DRIVERS[13] if driver is None else _major(driver)
    if version < _FIRST_DRIVERS[12]:
        return None
    if capability is not None and capability < _FIRST_WITH_CUDA_13:
        return "cu126"
    if version >= _FIRST_DRIVERS[13]:
        return "cu130"
    return "cu128" if capability is not None and capability >= _FIRST_WITH_CUDA_12_8 else "cu126"


def _major(version: str) -> int:
    digits = version.partition(".")[0]
    return int(digits) if digits.isdecimal() else 0
