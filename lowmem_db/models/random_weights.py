"""A model whose weights are drawn, not read: its configuration files are enough to measure how it trains."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lowmem_db import environment
from lowmem_db.models.families import find_family
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU, META

_BYTES_OF_FP32 = 4
_ROOM = 1.2  # a component fits where so many times its bytes are free


@dataclass(frozen=True, kw_only=True)
class RandomModel(ModelFolder):
    """A model with random weights.

    Attributes:
        where: Where weights are drawn if they fit, which is faster on a card; they go where they are asked for.
    """

    where: torch.device

    def load(self, component: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
        """Build a component in evaluation mode and frozen; a tokenizer is read as usual.

        Raises:
            ModelError: A configuration file is missing or damaged.
        """
        plain = super().load(component, META, dtype)
        if device.type == "meta" or not isinstance(plain, nn.Module):
            return plain
        built = _build(plain, self.where if _fits(plain, self.where) else CPU)
        return built.to(device, dtype).eval().requires_grad_(False)


def random_model(name: str, files: ModelFiles, where: torch.device) -> RandomModel:
    """Return a model with random weights.

    Args:
        name: What it is called.
        files: A folder with its configurations.
        where: Where weights are drawn.
    """
    return RandomModel(name=name, path=files.path, family=find_family(files), where=where)


def _fits(module: nn.Module, device: torch.device) -> bool:
    free = environment.free_bytes(device)
    values = sum(parameter.numel() for parameter in module.parameters())
    return free is None or values * _BYTES_OF_FP32 * _ROOM < free


def _build(like: nn.Module, device: torch.device) -> nn.Module:
    """Build a module of the class and the configuration of another, with weights drawn from a fixed seed."""
    kind, config = cast("Any", type(like)), like.config
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
