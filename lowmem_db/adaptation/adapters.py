"""Training low-rank adapters on frozen weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem_db.adaptation import low_rank, quantized
from lowmem_db.adaptation.base import Adaptation, Attached, Modules
from lowmem_db.adaptation.lora_file import lora_file, write_lora
from lowmem_db.config.strategy import autocast
from lowmem_db.models.denoiser import AUTOCAST_TYPES
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.saving import DTYPES
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.places import LORA_FILE


class LowRankAdapters(Adaptation):
    """LoRA (arXiv:2106.09685) or DoRA (arXiv:2402.09353), in fp32, on frozen weights of type ``lora.base_weights``."""

    noun = "LoRA"

    def check_machine(self, device: torch.device) -> None:
        """Refuse a run without a peft that works here, and quantized weights if bitsandbytes cannot be used."""
        low_rank.check_peft(self.config.lora)
        quantized.check_device(self.config.lora.base_weights, device)

    def load_dtype(self) -> torch.dtype:
        """Return the type of the frozen weights or, if they are quantized, the type they are multiplied in."""
        base = str(self.config.lora.base_weights)
        return DTYPES.get(base) or AUTOCAST_TYPES[autocast(self.config)] or torch.float32

    def attach(self, modules: Modules) -> Attached:
        """Freeze the model, quantize it if asked to, and add adapters."""
        quantized.quantize_where_asked(modules.values(), self.config.lora.base_weights, self.load_dtype())
        low_rank.attach(modules, self.config.lora, seed=self.config.seed)
        return Attached(undo=lambda: low_rank.detach(modules))

    def state(self, component: str, module: nn.Module) -> low_rank.AdapterState:
        """Return the adapters only: the frozen weights are in the base model."""
        return low_rank.AdapterState(component, module)

    def write(self, folder: Path, model: ModelFolder, modules: Modules, extra_bits: Mapping[str, Tensor]) -> None:
        """Write the adapters as one file for ``load_lora_weights``."""
        lora = lora_file(
            modules,
            low_rank.peft_settings(self.config.lora),
            dtype=DTYPES[self.config.final.precision],
            base=SuggestedBase(fields=self.config.model.model_dump(), key=model.base_key),
        )
        write_lora(folder / LORA_FILE, lora)

    def values_in_checkpoint(self, model: ModelFolder, trained: Mapping[str, int]) -> int:
        """Count the adapters only."""
        return sum(trained.values())

    def values_in_final(self, model: ModelFolder, trained: Mapping[str, int]) -> int:
        """Count the adapters only, which are written for diffusers and for other programs."""
        return 2 * sum(trained.values())
