"""A model on disk: its files, and the family that says what they are."""

from dataclasses import dataclass
from typing import Any

import torch

from lowmem_db.models.families import Family
from lowmem_db.models.families.spaces import Space
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.loading import CPU


@dataclass(frozen=True, kw_only=True)
class ModelFolder(ModelFiles):
    """A local model in diffusers' layout whose files were checked.

    Attributes:
        name: What the user called it.
        family: What kind of model it is.
    """

    name: str
    family: Family

    def load(self, component: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
        """Load a component: a module in evaluation mode and frozen, or a tokenizer.

        Args:
            component: Its name.
            device: Where a module goes; on the meta device its configuration is enough.
            dtype: Type of its weights, whatever type its file has.

        Raises:
            ModelError: It is damaged.
        """
        load = self.family.component(component).load
        assert load is not None, f"{component} of {self.family.name} is a configuration alone"
        return load(self, component, device, dtype)

    @property
    def space(self) -> Space:
        """The space of its pictures."""
        return self.family.space(self)

    @property
    def resolution(self) -> int:
        """Pixels of a side that it draws best."""
        return self.family.resolution(self)

    @property
    def whole_key(self) -> str:
        """Key of the bytes of all components."""
        return self.content_key(*(component.name for component in self.family.components))
