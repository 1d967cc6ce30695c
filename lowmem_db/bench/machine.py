"""The stage ``environment``: what the machine is, and what a CUDA context takes of it."""

from collections.abc import Iterator
from typing import Any, cast

import torch

from lowmem_db import environment, nvidia
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage


def card_of(setting: Setting) -> dict[str, Any]:
    """Return what is measured: name, bytes of memory, compute capability, driver."""
    name = next(each for each in environment.devices() if each["device"] == _indexed(setting.device))
    return {
        "name": name["name"],
        "memory_bytes": name["total_bytes"],
        "capability": name.get("capability"),
        "driver": nvidia.driver_version(),
    }


def _indexed(device: torch.device) -> str:
    return "cpu" if device.type != "cuda" else f"cuda:{device.index or 0}"


def _measurements(setting: Setting) -> Iterator[Measurement]:
    yield "back_ends", _back_ends
    yield "context", lambda: {"context_bytes": context_bytes(setting) if setting.is_cuda else None}
    yield "allocator", lambda: {"settings": _allocator_settings(setting)}


def _back_ends() -> Row:
    return {back_end["name"]: back_end["active"] for back_end in environment.back_ends()}


def context_bytes(setting: Setting) -> int:
    """Return what is in use of a card beside what the allocator reserved: the context, and other programs."""
    torch.zeros(1, device=setting.device)
    return environment.bytes_beside_allocator(setting.device)


def _allocator_settings(setting: Setting) -> dict[str, Any] | None:
    if not setting.is_cuda:
        return None
    settings = cast("Any", torch.cuda.memory._snapshot(setting.device))["allocator_settings"]
    return {name: settings[name] for name in ("expandable_segments", "max_split_size") if name in settings}


STAGE = Stage(name="environment", rows="measurements", limit_seconds=15.0, measurements=_measurements)
