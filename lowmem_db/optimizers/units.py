"""Parameters that are stepped together: one large parameter, or a row of all small parameters of a group."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowmem_db.distributed.shards import own
from lowmem_db.optimizers.rules import Sums
from lowmem_db.optimizers.states import States


class LargeParameter:
    """A single parameter.

    Args:
        name: ``component.name``.
        parameter: The parameter.
        states: The states, with this parameter's under its name.
        rounding_seed: Seed of its stochastic rounding, or None for other weight formats.
        sums: If it is shared out, what sums over the whole of it.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        states: States,
        rounding_seed: int | None,
        sums: Sums | None = None,
    ) -> None:
        self.name = name
        self.sums = sums
        self.parameters = {name: parameter}
        self.states = states
        self.rounding_seed = rounding_seed

    @property
    def group(self) -> str:
        """Name of its group, which is its component."""
        return self.name.partition(".")[0]

    def gradient(self) -> Tensor | None:
        """Return its gradient, which is shared out if the parameter is, or None if it has none."""
        return self.parameters[self.name].grad

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """Return a context with the weight, to be stepped in place."""
        yield own(self.parameters[self.name]).data

    def states_by_parameter(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return its state under its name."""
        return {self.name: self.states.at_rest(self.name)}


class SmallParameterRow:
    """All small parameters of a group, concatenated into one row and stepped by one kernel launch.

    A parameter without a gradient keeps its weight and, as it is zero, its state.

    Args:
        name: ``component.small``.
        parameters: The parameters by name.
        states: The states, with the row's under ``name``; each of its tensors has one element per element of the row.
        rounding_seed: Seed of the row's stochastic rounding, or None for other weight formats.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, nn.Parameter], states: States, rounding_seed: int | None
    ) -> None:
        self.name = name
        self.sums: Sums | None = None
        self.parameters = dict(parameters)
        self.states = states
        self.rounding_seed = rounding_seed

    @property
    def group(self) -> str:
        """Name of their group, which is their component."""
        return self.name.partition(".")[0]

    def gradient(self) -> Tensor | None:
        """Return the row of their gradients, or None if none has one."""
        parameters = self.parameters.values()
        if all(parameter.grad is None for parameter in parameters):
            return None
        return torch.cat(
            [
                (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
                for parameter in parameters
            ]
        )

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """Return a context with the row of weights, to be stepped in place, then copied to the parameters."""
        row = torch.cat([parameter.data.flatten() for parameter in self.parameters.values()])
        yield row
        pairs = [
            (parameter.data, piece.view_as(parameter))
            for parameter, piece in zip(self.parameters.values(), self._split(row), strict=True)
            if parameter.grad is not None
        ]
        torch._foreach_copy_([parameter for parameter, _ in pairs], [piece for _, piece in pairs])

    def states_by_parameter(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return each parameter's part of the state, by name."""
        pieces = {key: self._split(tensor) for key, tensor in self.states.at_rest(self.name).items()}
        return {
            name: {key: split[index].view_as(parameter) for key, split in pieces.items()}
            for index, (name, parameter) in enumerate(self.parameters.items())
        }

    def _split(self, row: Tensor) -> tuple[Tensor, ...]:
        return row.split([parameter.numel() for parameter in self.parameters.values()])


StepUnit = LargeParameter | SmallParameterRow
