"""Textual Inversion (arXiv:2208.01618): learning the embedding of a new word, with everything else frozen."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem_db.adaptation import quantized
from lowmem_db.adaptation.base import Adaptation, Attached, Modules
from lowmem_db.adaptation.layers import freeze
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import autocast
from lowmem_db.models.denoiser import AUTOCAST_TYPES
from lowmem_db.models.embedding_file import write_embedding
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.new_words import ExtendedEmbedding, NewWord, extended_embedding, find_extended
from lowmem_db.models.saving import DTYPES
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.places import EMBEDDING_FILE
from lowmem_db.storage.tensors import read_state


class LearnedEmbedding(Adaptation):
    """The rows of one new word in every text encoder, in fp32, on frozen weights of type ``lora.base_weights``."""

    noun = "embedding"

    def check_machine(self, device: torch.device) -> None:
        """Refuse quantized weights if bitsandbytes cannot be used."""
        quantized.check_device(self.config.lora.base_weights, device)

    def load_dtype(self) -> torch.dtype:
        """Return the type of the frozen weights or, if they are quantized, the type they are multiplied in."""
        base = str(self.config.lora.base_weights)
        return DTYPES.get(base) or AUTOCAST_TYPES[autocast(self.config)] or torch.float32

    def attach(self, modules: Modules) -> Attached:
        """Freeze the model, and make the rows of the new word trainable."""
        freeze(modules)
        quantized.quantize_where_asked(modules.values(), self.config.lora.base_weights, self.load_dtype())
        tables = list(_tables(modules).values())
        for table in tables:
            table.learn(self.config.textual_inversion.num_vectors)

        def undo() -> None:
            for table in tables:
                table.stop_learning()

        return Attached(undo=undo)

    def state(self, component: str, module: nn.Module) -> "EmbeddingState":
        """Return the learned rows only: everything else is in the base model."""
        del component
        return EmbeddingState(extended_embedding(module))

    def write(self, folder: Path, model: ModelFolder, modules: Modules, extra_bits: Mapping[str, Tensor]) -> None:
        """Write the rows as one file for ``load_textual_inversion`` and the programs that take such files."""
        dtype = DTYPES[self.config.final.precision]
        own = self.config.textual_inversion
        vectors = {name: learned_rows(table).to(dtype) for name, table in _tables(modules).items()}
        word = NewWord(token=own.token, num_vectors=own.num_vectors, vectors=vectors)
        base = SuggestedBase(fields=self.config.model.model_dump(), key=model.base_key)
        write_embedding(folder / EMBEDDING_FILE, word, base)

    def values_in_checkpoint(self, model: ModelFolder, trained: Mapping[str, int]) -> int:
        """Count the learned rows only."""
        return sum(trained.values())

    def values_in_final(self, model: ModelFolder, trained: Mapping[str, int]) -> int:
        """Count the learned rows only."""
        return sum(trained.values())


class EmbeddingState:
    """The learned rows of a text encoder, for checkpoints.

    Args:
        table: Its extended table.
    """

    def __init__(self, table: ExtendedEmbedding) -> None:
        self._table = table

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rows."""
        return {"learned": learned_rows(self._table)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the rows of :meth:`state_dict`."""
        learned_rows(self._table).copy_(state["learned"])


def word_of_checkpoint(folder: Path, config: Config) -> NewWord:
    """Return the word of a checkpoint, or its moving average if the run keeps one.

    Args:
        folder: The checkpoint.
        config: Configuration of its run.
    """
    files = {file.stem: file for file in sorted(folder.glob("text_encoder*.safetensors"))}
    vectors = {component: read_state(file)["learned"] for component, file in files.items()}
    if config.ema.enabled:
        average = read_state(folder / "ema.safetensors")
        vectors = {name.partition(".")[0]: rows for name, rows in average.items()}
    own = config.textual_inversion
    return NewWord(token=own.token, num_vectors=own.num_vectors, vectors=vectors)


def learned_rows(table: ExtendedEmbedding) -> Tensor:
    """Return the rows that train, without their gradient."""
    assert table.learned is not None, "no row trains"
    return table.learned.detach()


def _tables(modules: Modules) -> dict[str, ExtendedEmbedding]:
    """Return the extended tables of the text encoders; other components have none."""
    found = {name: find_extended(module) for name, module in modules.items()}
    return {name: table for name, table in found.items() if table is not None}
