"""Training steps to be measured: ours, and how long several kinds of steps take in turn."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowmem_db import environment
from lowmem_db.adaptation.base import Stateful
from lowmem_db.adaptation.finding import find_adaptation
from lowmem_db.adaptation.layers import that_train
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Clock
from lowmem_db.bench.strategies import Strategy
from lowmem_db.engine.build import build_step, set_arithmetic
from lowmem_db.engine.step import train_step
from lowmem_db.planning.phases import training_batches
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.checkpoint import restore_checkpoint, save_checkpoint

LEARNING_RATE = 1e-5
_ROOM_FOR_COPIES = 4


class Steps:
    """Real training steps of a strategy on made-up latents.

    Args:
        strategy: The strategy.
        device: Where it steps.
    """

    def __init__(self, strategy: Strategy, device: torch.device) -> None:
        config, self._device = strategy.config, device
        set_arithmetic(config, device)
        self.denoiser, self.objective, self.optimizer = build_step(config, strategy.model, device)
        self.optimizer.set_learning_rates(dict.fromkeys(self.denoiser.modules(), LEARNING_RATE))
        self._adaptation = find_adaptation(config)
        self._batches = training_batches(config, strategy.model, self.denoiser)
        self.number = 0

    def __call__(self) -> None:
        """Do one step."""
        train_step(self.denoiser, self.objective, self.optimizer, self._batches, self.number)
        self.number += 1

    def state(self) -> dict[str, Any]:
        """Return a copy of what the next step depends on; on the host, unless the device has room for several."""
        found: dict[str, Any] = {name: each.state_dict() for name, each in self._stateful().items()}
        free, num_bytes = environment.free_bytes(self._device), _num_bytes(found)
        has_room = free is not None and free > _ROOM_FOR_COPIES * num_bytes
        return {"number": self.number} | _copied(found, None if has_room else torch.device("cpu"))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state that :meth:`state` returned."""
        self.number = state["number"]
        for name, each in self._stateful().items():
            each.load_state_dict(state[name])

    def save(self, run: RunFolder) -> None:
        """Write a checkpoint, as a run does."""
        save_checkpoint(run, self.number, self._stateful(), data_key="")

    def resume(self, run: RunFolder) -> None:
        """Go on from the newest complete checkpoint."""
        self.number = run.complete_steps()[-1]
        restore_checkpoint(run, self.number, self._stateful())

    def _stateful(self) -> dict[str, Stateful]:
        trained = that_train(self.denoiser.modules())
        found: dict[str, Stateful] = {name: self._adaptation.state(name, module) for name, module in trained.items()}
        return found | {"optimizer": self.optimizer}


def first_difference(state: Any, other: Any, name: str = "") -> str | None:
    """Return the name of the first value that differs between two states, or None where they agree bit for bit."""
    if isinstance(state, Mapping):
        below = (first_difference(value, other[key], f"{name}.{key}".strip(".")) for key, value in state.items())
        return next((found for found in below if found is not None), None)
    same = torch.equal(state, other.to(state.device)) if isinstance(state, Tensor) else state == other
    return None if same else name


def seconds_in_turn(
    steps: Mapping[str, Callable[[], object]], setting: Setting, clock: Clock | None = None
) -> dict[str, float]:
    """Return the median seconds of several kinds of steps, taken alternately so that a slow moment meets all.

    Args:
        steps: Each does one step.
        setting: What is measured.
        clock: Tells the seconds.
    """
    now = (clock or Clock()).now
    num_warm, num_timed = (1, 2) if setting.tiny else (2, 5) if setting.quick else (3, 10)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_warm + num_timed):
        for name, step in steps.items():
            setting.synchronize()
            started = now()
            step()
            setting.synchronize()
            seconds[name].append(now() - started)
    return {name: statistics.median(taken[num_warm:]) for name, taken in seconds.items()}


def _copied(state: Mapping[str, Any], device: torch.device | None) -> dict[str, Any]:
    """Return a copy of a tree on a device. Default: each tensor stays where it is."""
    return {key: _copy(value, device) for key, value in state.items()}


def _copy(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Mapping):
        return _copied(value, device)
    return value.detach().to(device or value.device, copy=True) if isinstance(value, Tensor) else value


def _num_bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(_num_bytes(each) for each in value.values())
    return value.nbytes if isinstance(value, Tensor) else 0
