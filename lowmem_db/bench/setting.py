"""Where a machine is measured, and how thoroughly."""

from dataclasses import dataclass
from functools import cached_property

import torch

from lowmem_db.models.files import ModelFiles
from lowmem_db.models.random_weights import RandomModel, random_model
from lowmem_db.models.single_file import CONFIGS_DIR
from lowmem_db.planning.cards import CPU, Card, card_here
from lowmem_db.storage.places import DEMO_DIR


@dataclass(frozen=True)
class Setting:
    """What every stage is told.

    Attributes:
        device: What is measured.
        tiny: The small model of this package stands for Stable Diffusion, and fewer strategies are tried.
        quick: Fewer strategies and fewer repeats.
    """

    device: torch.device
    tiny: bool = False
    quick: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether a card is measured."""
        return self.device.type == "cuda"

    @property
    def is_small(self) -> bool:
        """Whether fewer strategies are tried."""
        return self.tiny or self.quick

    @cached_property
    def card(self) -> Card:
        """The device, as the planner knows it."""
        return card_here(self.device) if self.is_cuda else CPU

    @cached_property
    def model(self) -> RandomModel:
        """The model that most stages train: Stable Diffusion 1.5, or the small one."""
        return self._random("demo", ModelFiles(path=DEMO_DIR)) if self.tiny else self.bundled("sd15")

    def bundled(self, name: str) -> RandomModel:
        """Return one of the models whose configurations are in this package."""
        return self._random(name, ModelFiles(path=CONFIGS_DIR / name))

    def _random(self, name: str, files: ModelFiles) -> RandomModel:
        return random_model(name, files, self.device)

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
