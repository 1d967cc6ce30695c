"""Exponential moving average of the weights, in fp32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """An average of what trains: ``average += (1 - decay) * (weight - average)``.

    The decay of step ``s`` is ``min(decay, (1 + s) / (10 + s))``, so that the first weights are soon forgotten.

    Args:
        parameters: What is averaged, by name; the names are those of the checkpoint.
        decay: Largest decay.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.average = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step; the first step is 1."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach().float(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model, and the trained weights back afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by name."""
        return self.average

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the average of :meth:`state_dict`."""
        for name, average in self.average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            weight = parameter.detach().float().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weight)
