"""Exponential moving average of the weights, in fp32."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.distributed.shards import is_shared, own
from lowmem_db.optimizers.states import load_into
from lowmem_db.optimizers.weights import in_fp32


class ExponentialMovingAverage:
    """An average of the trained weights: ``average += (1 - decay) * (weight - average)``.

    The decay at step ``s`` is ``min(decay, (1 + s) / (10 + s))``, so that the initial weights are soon forgotten.

    Args:
        parameters: The weights to average, by their names in checkpoints.
        extra_bits: Returns the extra bits of 24-bit weights, by name; called whenever weights are read.
        decay: Largest decay.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        extra_bits: Callable[[], Mapping[str, Tensor]],
        *,
        decay: float,
    ) -> None:
        self.parameters = dict(parameters)
        self.extra_bits = extra_bits
        self.decay = decay
        self.average = {name: weight.clone() for name, weight in self._weights()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after a step; the first step is 1."""
        factor = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for name, weight in self._weights():
            self.average[name].lerp_(weight, factor)

    @contextmanager
    def applied(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Return a context in which the model has the averaged weights.

        Args:
            dtype: Type of the weights in the context; fp32 uses the average without rounding. Default: the model's.
        """
        shared = {name: parameter for name, parameter in self.parameters.items() if is_shared(parameter)}
        others = {name: parameter for name, parameter in self.parameters.items() if name not in shared}
        trained = {name: parameter.data for name, parameter in others.items()}
        trained |= {name: own(parameter).clone() for name, parameter in shared.items()}
        try:
            for name, parameter in others.items():
                parameter.data = self.average[name].to(dtype or parameter.dtype)
            for name, parameter in shared.items():  # whose memory FSDP2 refers to
                own(parameter).copy_(self.average[name])
            yield
        finally:
            for name, parameter in others.items():
                parameter.data = trained[name]
            for name, parameter in shared.items():
                own(parameter).copy_(trained[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, by name."""
        return self.average

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the average of :meth:`state_dict`.

        Raises:
            KeyError: A tensor is missing.
            ValueError: One has another shape or type.
        """
        for name, average in self.average.items():
            load_into(average, state, name, of="the moving average")

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight in fp32: the parameter itself, or a new tensor."""
        extra_bits = self.extra_bits()
        for name, parameter in self.parameters.items():
            yield name, in_fp32(own(parameter).detach(), extra_bits.get(name))
