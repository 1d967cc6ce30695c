"""Checkpoints of a model that is shared out between processes: the files that one process would write.

The first process writes and reads them. What it needs of the others, it asks them for; they answer until it needs no
more.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lowmem_db_kernels.codec import BLOCK_SIZE
from torch import Tensor, nn

from lowmem_db.adaptation.base import Stateful
from lowmem_db.distributed.shards import is_shared, joined_parts, own, rows_of
from lowmem_db.distributed.world import World
from lowmem_db.optimizers.states import load_into

Path = tuple[str, ...]
_OPTIONAL = "loss_scale"  # a checkpoint of another precision has none, or one that is not needed


class SharedState:
    """The objects of a checkpoint, of which each process holds a part.

    Args:
        world: The processes.
        objects: The objects of this process, by name.
        parameters: The parameters that are shared out, by ``component.name``.
    """

    def __init__(self, world: World, objects: Mapping[str, Stateful], parameters: Mapping[str, nn.Parameter]) -> None:
        self._world = world
        self._objects = {
            name: _Weights(each) if isinstance(each, nn.Module) else each for name, each in objects.items()
        }
        self._parameters = parameters

    @contextmanager
    def asking(self) -> Iterator[dict[str, Stateful]]:
        """Return a context in which the first process has the whole objects; the others :meth:`answer` meanwhile."""
        try:
            yield {name: _Whole(self, name) for name in self._objects}
        finally:
            self._world.from_first(lambda: None)

    def answer(self) -> None:
        """Do what the first process asks for."""
        while (asked := self._asked()) is not None:
            name, kind = asked
            if kind == "gather":
                self.gathered(name)
            else:
                self.scatter(name, {})

    def _asked(self) -> tuple[str, str] | None:
        asked: tuple[str, str] | None = None  # by this process, which asks for nothing
        return self._world.from_first(lambda: asked)

    def ask(self, name: str, kind: Literal["gather", "scatter"]) -> None:
        """Make the others call :meth:`gathered` or :meth:`scatter` for an object, as this process is about to."""
        self._world.from_first(lambda: (name, kind))

    def gathered(self, name: str) -> dict[str, Any]:
        """Return the whole state of an object, on the host of the first process."""
        state = self._objects[name].state_dict()
        leaves: dict[Path, Any] = {}
        for path, leaf in _leaves(state):
            leaves[path] = leaf
            if isinstance(leaf, Tensor):
                found = self._joined(name, path, leaf)
                leaves[path] = found.cpu() if self._world.is_first else None
        return _rebuilt(state, leaves)

    def check(self, name: str, state: Mapping[str, Any]) -> None:
        """Refuse a whole state that does not fit, before the others wait for it.

        Raises:
            KeyError: A tensor is missing.
            ValueError: One has another shape or type.
        """
        given: dict[Path, Any] = dict(_leaves(state))
        for path, leaf in _leaves(self._objects[name].state_dict()):
            found = _of(given, path, leaf)
            if isinstance(leaf, Tensor):
                parameter = self._shared(name, path, leaf)
                shape = leaf.shape if parameter is None else _whole_shape(leaf, parameter)
                place = torch.empty(shape, dtype=leaf.dtype, device="meta")
                load_into(place, {path[-1]: found}, path[-1], of=".".join(path[:-1]) or name)

    def scatter(self, name: str, state: Mapping[str, Any]) -> None:
        """Load the state of an object, of which the first process gives the whole."""
        before = self._objects[name].state_dict()
        given: dict[Path, Any] = dict(_leaves(state))
        leaves: dict[Path, Any] = {}
        for path, leaf in _leaves(before):
            found = _of(given, path, leaf) if self._world.is_first else None
            if isinstance(leaf, Tensor):
                parameter = self._shared(name, path, leaf)
                whole = torch.empty(
                    leaf.shape if parameter is None else _whole_shape(leaf, parameter),
                    dtype=leaf.dtype,
                    device=leaf.device,
                )
                if found is not None:
                    whole.copy_(found)
                self._world.send_from(0, [whole])
                leaves[path] = whole if parameter is None else self._own_part(whole, leaf, parameter)
            else:
                leaves[path] = self._world.gathered(found)[0]
        self._objects[name].load_state_dict(_rebuilt(before, leaves))

    def _shared(self, name: str, path: Path, leaf: Tensor) -> nn.Parameter | None:
        """Return the parameter that a tensor belongs to, if it holds some rows of it or of its state."""
        for key in (f"{name}.{path[-1]}", *path):
            if key in self._parameters:
                parameter = self._parameters[key]
                is_whole = leaf.shape == parameter.shape  # the bits of a weight that does not train
                return None if is_whole else parameter
        return None

    def _joined(self, name: str, path: Path, leaf: Tensor) -> Tensor:
        """Return the whole of a tensor; all processes call this together."""
        if (parameter := self._shared(name, path, leaf)) is None:
            return leaf
        return joined_parts(leaf, _whole_shape(leaf, parameter), self._lengths(leaf, parameter), self._world)

    def _lengths(self, leaf: Tensor, parameter: nn.Parameter) -> list[int]:
        """Return how long the parts of all processes are, in rows or in the blocks of 8-bit states."""
        rows = [each.stop - each.start for each in rows_of(len(parameter), self._world.size)]
        if leaf.shape == own(parameter).shape:
            return rows
        return [-(-each * parameter.shape[1:].numel() // BLOCK_SIZE) for each in rows]

    def _own_part(self, whole: Tensor, leaf: Tensor, parameter: nn.Parameter) -> Tensor:
        return whole.split(self._lengths(leaf, parameter))[self._world.rank].clone()


def parameters_shared_out(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of which each process holds some rows, by ``component.name``; tied ones by each name.

    Args:
        modules: Components by name, between two steps.
    """
    return {
        f"{component}.{name}": tensor
        for component, module in modules.items()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if is_shared(tensor)
    }


class _Whole:
    """An object as a whole, in the first process."""

    def __init__(self, shared: SharedState, name: str) -> None:
        self._shared, self._name = shared, name

    def state_dict(self) -> dict[str, Any]:
        self._shared.ask(self._name, "gather")
        return self._shared.gathered(self._name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._shared.check(self._name, state)
        self._shared.ask(self._name, "scatter")
        self._shared.scatter(self._name, state)


class _Weights:
    """The weights of a module that this process holds."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def state_dict(self) -> dict[str, Tensor]:
        return {name: own(tensor).detach() for name, tensor in self._module.state_dict(keep_vars=True).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            load_into(tensor, state, name, of="the weights")


def _leaves(state: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _rebuilt(state: Mapping[str, Any], leaves: Mapping[Path, Any], path: Path = ()) -> dict[str, Any]:
    """Return a state of the same structure with other leaves."""
    return {
        key: _rebuilt(value, leaves, (*path, key)) if isinstance(value, Mapping) else leaves[(*path, key)]
        for key, value in state.items()
    }


def _of(given: Mapping[Path, Any], path: Path, default: Any) -> Any:
    """Return a leaf that a state must have, unless it is optional."""
    return given.get(path, default) if path[0] == _OPTIONAL else given[path]


def _whole_shape(leaf: Tensor, parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole of a parameter, or of a tensor with a value for each block of it."""
    if leaf.shape == own(parameter).shape:
        return parameter.shape
    return torch.Size([-(-parameter.numel() // BLOCK_SIZE)])
