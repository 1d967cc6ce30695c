"""What is stepped at once: a large parameter, or all small parameters of a group in one row."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowmem_db.optimizers.states import States


class LargeParameter:
    """One parameter by itself.

    Args:
        name: ``component.name``.
        parameter: The parameter.
        states: Has its state under its name.
        rounding_seed: Seed of its stochastic rounding; None for the other kinds of weights.
    """

    def __init__(self, name: str, parameter: nn.Parameter, states: States, rounding_seed: int | None) -> None:
        self.name = name
        self.parameters = {name: parameter}
        self.states = states
        self.rounding_seed = rounding_seed

    @property
    def group(self) -> str:
        """Name of its group, which is that of its component."""
        return self.name.partition(".")[0]

    def gradient(self) -> Tensor | None:
        """Return its gradient, or None where it has none."""
        return self.parameters[self.name].grad

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """Return a context with the weight, to be stepped in place."""
        yield self.parameters[self.name].data

    def states_by_parameter(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return its state under its name."""
        return {self.name: self.states.at_rest(self.name)}


class SmallParameters:
    """All small parameters of a group, in one row: one launch steps them.

    One that has no gradient keeps its weight and, being zero, its state.

    Args:
        name: ``component.small``.
        parameters: The parameters by name.
        states: Has one state for the row under ``name``; each of its tensors has an element per element of the row.
        rounding_seed: Seed of the stochastic rounding of the row; None for the other kinds of weights.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, nn.Parameter], states: States, rounding_seed: int | None
    ) -> None:
        self.name = name
        self.parameters = dict(parameters)
        self.states = states
        self.rounding_seed = rounding_seed

    @property
    def group(self) -> str:
        """Name of their group, which is that of their component."""
        return self.name.partition(".")[0]

    def gradient(self) -> Tensor | None:
        """Return the row of their gradients, or None where none has one."""
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
        """Return a context with the row of weights, to be stepped in place; afterwards the parameters have it."""
        row = torch.cat([parameter.data.flatten() for parameter in self.parameters.values()])
        yield row
        pairs = [
            (parameter.data, piece.view_as(parameter))
            for parameter, piece in zip(self.parameters.values(), self._split(row), strict=True)
            if parameter.grad is not None
        ]
        torch._foreach_copy_([parameter for parameter, _ in pairs], [piece for _, piece in pairs])

    def states_by_parameter(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return each parameter's piece of the state under its name."""
        pieces = {key: self._split(tensor) for key, tensor in self.states.at_rest(self.name).items()}
        return {
            name: {key: split[index].view_as(parameter) for key, split in pieces.items()}
            for index, (name, parameter) in enumerate(self.parameters.items())
        }

    def _split(self, row: Tensor) -> tuple[Tensor, ...]:
        return row.split([parameter.numel() for parameter in self.parameters.values()])


StepUnit = LargeParameter | SmallParameters
