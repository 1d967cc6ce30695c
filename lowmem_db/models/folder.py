"""A model on disk: its files and its family."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lowmem_db.environment import without_downloads
from lowmem_db.models.families import Family
from lowmem_db.models.families.base import Load
from lowmem_db.models.families.spaces import Space
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.loading import CPU, META
from lowmem_db.models.new_words import extend
from lowmem_db.storage.checksums import check_folder


@dataclass(frozen=True, kw_only=True)
class ModelFolder(ModelFiles):
    """A local model in diffusers' layout whose files have been checked.

    Attributes:
        name: What the user called it.
        family: Its family.
    """

    name: str
    family: Family

    def load(self, component: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
        """Load a component: a frozen module in evaluation mode, or a tokenizer; both with the new words.

        Args:
            component: Its name.
            device: Device of a module; on the meta device its configuration is enough.
            dtype: Type of its weights, whatever the type in the file.

        Raises:
            ModelError: It is damaged.
            StorageError: A file has changed since this program wrote it.
        """
        loaded = self._load(self.family.component(component).load, component, device, dtype)
        if self.words and component in self.family.text_encoders:
            tokenizer = None if device.type == "meta" else self.load(self.tokenizer_of(component))
            extend(loaded, component, tokenizer, self.words)
        return loaded

    def load_whole(self, component: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
        """Load a module with all of its weights in memory, without new words; otherwise as :meth:`load`."""
        found = self.family.component(component)
        return self._load(found.load_whole or found.load, component, device, dtype)

    def _load(self, load: Load | None, component: str, device: torch.device, dtype: torch.dtype) -> Any:
        if device.type != "meta":
            self.verify(component)
        assert load is not None, f"{component} of {self.family.name} has only a configuration"
        with without_downloads():
            return load(self, component, device, dtype)

    def tokenizer_of(self, text_encoder: str) -> str:
        """Return the component name of the tokenizer of a text encoder."""
        position = self.family.text_encoders.index(text_encoder)
        return self.family.names_of("tokenizer")[position]

    def verify(self, component: str) -> None:
        """Compare the files of a component with their checksums, if this program wrote the folder.

        Raises:
            StorageError: One has changed.
        """
        if component in self.replaced:
            check_folder(self.replaced[component])
        else:
            check_folder(self.path, below=f"{component}/")

    def num_parameters(self, component: str) -> int:
        """Return the number of parameters of a component, whose weights need not be there."""
        if self.has_weights(component):
            return super().num_parameters(component)
        if component not in self._counted:
            self._counted[component] = sum(weight.numel() for weight in self.load_whole(component, META).parameters())
        return self._counted[component]

    @cached_property
    def _counted(self) -> dict[str, int]:
        """Parameters of components without weights; building them takes as long as a part of a plan."""
        return {}

    @property
    def space(self) -> Space:
        """The space of its pictures."""
        return self.family.space(self)

    @property
    def resolution(self) -> int:
        """The side length, in pixels, that it was trained for."""
        return self.family.resolution(self)

    @property
    def whole_key(self) -> str:
        """Key of the bytes of all components."""
        return self.content_key(*(component.name for component in self.family.components))

    @property
    def base_key(self) -> str:
        """Key of the bytes of all components, whatever new words there are: what a LoRA or an embedding carries."""
        return replace(self, words=()).whole_key

    @cached_property
    def bytes_key(self) -> str:
        """Key of what is loaded of all components; reading it takes seconds."""
        return self.loaded_key(*(component.name for component in self.family.components))
