"""A spill that only the time betrays: a driver may move a card's memory to the host instead of raising an error."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from lowmem_db import environment
from lowmem_db.console import warn
from lowmem_db.training.observers import Observer

_SLOWER = 3.0
_IN_A_ROW = 5
_NUM_STEPS = 10  # before a median says anything
_FULL = 0.9  # of the card


class SpillWatch(Observer):
    """Warns once if several steps in a row take three times the run's median while the card is nearly full.

    Args:
        device: The device that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._usual: deque[float] = deque(maxlen=100)
        self._num_slow = 0
        self._is_first = True

    def step(self, row: Mapping[str, Any]) -> None:
        """Compare the time of a step with those before it; the first one compiles kernels and does not count."""
        seconds, is_first, self._is_first = row["seconds"], self._is_first, False
        if is_first or self._device.type != "cuda":
            return
        if len(self._usual) < _NUM_STEPS or seconds <= _SLOWER * median(self._usual):
            self._usual.append(seconds)
            self._num_slow = 0
            return
        self._num_slow += 1
        if self._num_slow == _IN_A_ROW and environment.reserved_share(self._device) >= _FULL:
            warn(
                f"the last {_IN_A_ROW} steps took over {_SLOWER:.0f} times as long as before, and the card is full: "
                "its driver seems to move memory to the host. Close other programs, lower memory.budget, continue with "
                "--resume; on Windows, switch off the driver's system memory fallback"
            )
