"""What a launcher (torchrun, accelerate launch, srun) tells each of its processes in the environment."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lowmem_db.errors import ConfigError

_Item = TypeVar("_Item")
_WAY_OUT = "start with torchrun or accelerate launch, which set it, or unset WORLD_SIZE and RANK for one process"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes that a launcher started, and which of them this one is.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def launched() -> Launch:
    """Return what the launcher says; without one, a single process.

    Raises:
        ConfigError: ``WORLD_SIZE``, ``RANK``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` do not fit together.
    """
    size = _number("WORLD_SIZE", default=1, least=1)
    rank = _number("RANK", default=0 if size == 1 else None)
    if rank >= size:
        said = f"is {rank}, but WORLD_SIZE is {size}" if "WORLD_SIZE" in os.environ else f"is {rank} without WORLD_SIZE"
        raise ConfigError(f"RANK: {said}; allowed: 0 to {size - 1}; {_WAY_OUT}")
    if size == 1:
        return Launch()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"{name}: is not set, but WORLD_SIZE is {size}; {_WAY_OUT}")
    return Launch(rank=rank, size=size, local_rank=_number("LOCAL_RANK"))


def own_first(items: Sequence[_Item]) -> list[_Item]:
    """Return work that several processes find done or do, in an order in which each begins with another part."""
    launch = launched()
    return [item for first in range(launch.size) for item in items[(launch.rank + first) % launch.size :: launch.size]]


def is_first() -> bool:
    """Return whether this process is the one that speaks for all: any process without a launcher does."""
    try:
        return launched().rank == 0
    except ConfigError:  # is reported where processes matter
        return True


def name_of_process() -> str:
    """Return the words before an error of this process; nothing if it is the only one."""
    try:
        launch = launched()
    except ConfigError:
        return ""
    return f"rank {launch.rank}: " if launch.size > 1 else ""


def _number(name: str, *, default: int | None = None, least: int = 0) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < least:
        said = repr(text) if text else "not set"
        raise ConfigError(f"{name}: is {said}; allowed: whole numbers from {least}; {_WAY_OUT}")
    return int(text)
