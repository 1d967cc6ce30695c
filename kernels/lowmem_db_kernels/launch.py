"""Launch configurations, read from JSON per device name and never tuned at run time."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._triton import FP_FUSION

_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        block: Elements per chunk; partial sums are kept per chunk, so it decides the order of a sum.
        num_warps: Warps per program.
        programs: Upper limit of programs on the first grid axis, each processing several chunks; None launches one per
            chunk. It never changes a result.
        reverse: Run the programs backwards, for tests of order.
    """

    block: int
    num_warps: int
    programs: int | None = None
    reverse: bool = False

    def grid(self, num_chunks: int) -> int:
        """Return the number of programs for a number of chunks."""
        return num_chunks if self.programs is None else min(num_chunks, self.programs)

    @property
    def options(self) -> dict[str, int | bool]:
        """Return the compile options that every launch passes."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": FP_FUSION}


_override: dict[str, Any] = {}


def launch_config(op: str, tensor: Tensor) -> LaunchConfig:
    """Return the launch configuration of an operator on a tensor's device.

    Args:
        op: Name of the operator.
        tensor: Any tensor on the device.

    Returns:
        The entry in `configs/<device name>.json`, or else in `configs/default.json`.
    """
    name = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else "default"
    config = LaunchConfig(**_table(name)[op])
    return replace(config, **_override) if _override else config


@contextmanager
def override_launch(**fields: Any) -> Iterator[None]:
    """Replace fields of every launch configuration inside a `with` block.

    Args:
        **fields: Fields of `LaunchConfig`.
    """
    _override.update(fields)
    try:
        yield
    finally:
        _override.clear()


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which Triton launches on the tensor's device.

    Args:
        tensor: Any argument of the kernel.

    Returns:
        A context manager.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@lru_cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    table = json.loads((_CONFIGS / "default.json").read_text())
    special = _CONFIGS / f"{name.replace(' ', '_').replace('/', '_')}.json"
    if name != "default" and special.exists():
        table |= json.loads(special.read_text())
    return table
