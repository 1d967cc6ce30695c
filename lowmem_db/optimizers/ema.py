"""Exponential moving average of the weights, in fp32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.optimizers.weights import in_fp32


class ExponentialMovingAverage:
    """An average of what trains: ``average += (1 - decay) * (weight - average)``.

    The decay of step ``s`` is ``min(decay, (1 + s) / (10 + s))``, so that the first weights are soon forgotten.

    Args:
        parameters: What is averaged, by name; the names are those of the checkpoint.
        extra_bits: Extra bits of 24-bit weights by name, as they stand on the device.
        decay: Largest decay.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], extra_bits: Mapping[str, Tensor], *, decay: float
    ) -> None:
        self.parameters = dict(parameters)
        self.extra_bits = extra_bits
        self.decay = decay
        self.average = {name: self._weight(name).clone() for name in self.parameters}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step; the first step is 1."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for name, average in self.average.items():
            average.lerp_(self._weight(name), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model, and the trained weights back afterwards."""
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by name."""
        return self.average

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the average of :meth:`state_dict`."""
        for name, average in self.average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def _weight(self, name: str) -> Tensor:
        return in_fp32(self.parameters[name].detach(), self.extra_bits.get(name))
