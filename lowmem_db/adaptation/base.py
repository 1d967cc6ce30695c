"""The interface of what trains: how it is put into a model, what a checkpoint and ``final/`` hold."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lowmem_db.config.schema import Config
from lowmem_db.models.folder import ModelFolder

Modules = Mapping[str, nn.Module]
"""Components by name, the denoiser first."""


@runtime_checkable
class Stateful(Protocol):
    """Anything with state that a checkpoint must hold."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Load a state."""
        ...


@dataclass(frozen=True, kw_only=True)
class Attached:
    """An adaptation inside a model.

    Attributes:
        undo: Removes it again and freezes the model.
        extra_bits: Eight more bits of bf16 weights, by ``component.name``, if the weights have 24 bits.
    """

    undo: Callable[[], None]
    extra_bits: dict[str, Tensor] = field(default_factory=dict)


class Adaptation(ABC):
    """A way to train a model; ``find_adaptation`` chooses it from the configuration.

    Attributes:
        noun: Word for what ``final/`` holds, in messages.
        config: The resolved configuration.
    """

    noun: str

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def check_machine(self, device: torch.device) -> None:
        """Refuse what this machine cannot do, before looking for a model.

        Raises:
            ConfigError: The device cannot be used.
            DependencyError: A library is missing.
        """

    @abstractmethod
    def load_dtype(self) -> torch.dtype:
        """Return the type to load components in."""

    def reading(self) -> AbstractContextManager[None]:
        """Return a context for loading components, in which weights may be converted as they are read."""
        return nullcontext()

    @abstractmethod
    def attach(self, modules: Modules) -> Attached:
        """Put it into loaded components, in place, so that it trains and nothing else does.

        Raises:
            ConfigError: A field selects nothing in the model.
        """

    @abstractmethod
    def state(self, component: str, module: nn.Module) -> Stateful:
        """Return what a checkpoint holds of a component."""

    @abstractmethod
    def write(self, folder: Path, model: ModelFolder, modules: Modules, extra_bits: Mapping[str, Tensor]) -> None:
        """Write ``final/``: what diffusers loads.

        Args:
            folder: An existing, empty folder.
            model: The model that training started from.
            modules: Components that trained.
            extra_bits: Eight more bits of bf16 weights by ``component.name``.
        """

    @abstractmethod
    def values_in_checkpoint(self, model: ModelFolder, trained: Mapping[str, int]) -> int:
        """Return how many weights a checkpoint holds, including those that do not train.

        Args:
            model: The model.
            trained: Number of parameters that train, by component.
        """

    @abstractmethod
    def values_in_final(self, model: ModelFolder, trained: Mapping[str, int]) -> int:
        """Return how many weights ``final/`` holds; arguments as for :meth:`values_in_checkpoint`."""
