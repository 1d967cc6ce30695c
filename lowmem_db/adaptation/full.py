"""Training all weights of a model, or those of the layers that ``training.layers`` selects."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem_db.adaptation.base import Adaptation, Attached, Modules
from lowmem_db.adaptation.layers import freeze, train_layers
from lowmem_db.config.schema import Config
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.reading import converted
from lowmem_db.models.saving import DTYPES, save_model
from lowmem_db.optimizers import weights


class FullWeights(Adaptation):
    """Full fine-tuning, in one of the weight formats of :mod:`lowmem_db.optimizers.weights`."""

    noun = "model"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._extra_bits: dict[str, Tensor] = {}

    def check_machine(self, device: torch.device) -> None:
        """Accept every machine: full fine-tuning needs only torch."""

    def load_dtype(self) -> torch.dtype:
        """Return fp32, from which the weights are converted to their training format."""
        return torch.float32

    def reading(self) -> AbstractContextManager[None]:
        """Return a context in which weights are converted to their training format as they are read."""
        self._extra_bits = {}
        convert = weights.converter(self.config.memory.weights or "fp32", self._extra_bits)
        return nullcontext() if convert is None else converted(convert)

    def attach(self, modules: Modules) -> Attached:
        """Convert weights that are still in fp32 to their format, and make the selected layers trainable."""
        extra_bits = self._extra_bits | weights.apply(modules, self.config.memory.weights or "fp32")
        self._extra_bits = {}
        train_layers(modules, self.config.training.layers)
        kept = dict(extra_bits)

        def undo() -> None:
            weights.undo(modules, kept)
            freeze(modules)

        return Attached(undo=undo, extra_bits=extra_bits)

    def state(self, component: str, module: nn.Module) -> nn.Module:
        """Return the module: a checkpoint holds all of its weights."""
        return module

    def write(self, folder: Path, model: ModelFolder, modules: Modules, extra_bits: Mapping[str, Tensor]) -> None:
        """Write a complete model: trained components in ``final.precision``, the others unchanged."""
        save_model(
            folder,
            model,
            modules,
            dtype=DTYPES[self.config.final.precision],
            objective=self.config.objective,
            extra_bits=extra_bits,
        )

    def values_in_checkpoint(self, model: ModelFolder, trained: Mapping[str, int]) -> int:
        """Count all weights of the components in which something trains."""
        return sum(model.num_parameters(name) for name, count in trained.items() if count)

    def values_in_final(self, model: ModelFolder, trained: Mapping[str, int]) -> int:
        """Count all weights of the model."""
        return sum(model.num_parameters(name) for name in model.family.with_weights)
