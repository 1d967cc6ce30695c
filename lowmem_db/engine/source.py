"""The model that images are drawn from: a model on disk, with what a run has trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_db.adaptation.embeddings import word_of_checkpoint
from lowmem_db.adaptation.lora_file import LORA_FILE, LoraFile, lora_of_checkpoint, put_into, read_lora
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config, ObjectiveConfig
from lowmem_db.console import say
from lowmem_db.data.batches import PromptTable
from lowmem_db.errors import DataError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.embedding_file import EMBEDDING_FILE, read_base, read_embedding
from lowmem_db.models.finding import final_model_of, find_model, model_of, with_words
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.new_words import NewWord
from lowmem_db.models.text_encoders import embed_prompts
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_state


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A model to draw from.

    Attributes:
        model: The folder with its components.
        checkpoint: Checkpoint of an unfinished run, whose weights replace those of the folder, or None.
        lora: Adapters to add to the components, or None.
        lora_files: The files with the adapters.
        run_config: Configuration of its run, or None.
    """

    model: ModelFolder
    checkpoint: Path | None = None
    lora: LoraFile | None = None
    lora_files: tuple[Path, ...] = ()
    run_config: Config | None = None

    @property
    def trained_files(self) -> tuple[Path, ...]:
        """Files that the images depend on, besides those of the model."""
        return self.lora_files if self.checkpoint is None else tuple(sorted(self.checkpoint.glob("*.safetensors")))

    @property
    def resolution(self) -> int:
        """The side length, in pixels, of its run, or the one the model was trained for."""
        return self.model.resolution if self.run_config is None else self.run_config.data.resolution

    @property
    def objective(self) -> ObjectiveConfig | None:
        """The run's changes to the noise process and the prediction, or None."""
        return None if self.run_config is None else self.run_config.objective

    def load(self, component: str, device: torch.device, dtype: torch.dtype) -> Any:
        """Load a component with its trained weights or adapters."""
        module = self.model.load(component, device, dtype)
        self._take_trained(module, component)
        return module

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> Denoiser:
        """Load the denoiser, without text encoders."""
        family = self.model.family
        return Denoiser(family, {family.denoiser: self.load(family.denoiser, device, dtype)})

    def embed(self, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> PromptTable:
        """Return the text encoders' embeddings of prompts."""
        text_encoders = {name: self.load(name, device, dtype) for name in self.model.family.text_encoders}
        return embed_prompts(self.model, text_encoders, prompts)

    def _take_trained(self, module: nn.Module, component: str) -> None:
        """Put what a run has trained into a component: adapters, or the weights of its checkpoint.

        If the run keeps a moving average, the checkpoint's average is used.
        """
        if self.lora is not None:
            put_into(component, module, self.lora)
        if self.checkpoint is None or not (self.checkpoint / f"{component}.safetensors").is_file():
            return
        module.load_state_dict(read_state(self.checkpoint / f"{component}.safetensors"))
        if self.run_config is not None and self.run_config.ema.enabled:
            average = read_state(self.checkpoint / "ema.safetensors")
            prefix = f"{component}."
            own = {name.removeprefix(prefix): value for name, value in average.items() if name.startswith(prefix)}
            module.load_state_dict(own, strict=False)


def find_source(source: str) -> ImageSource:
    """Find a model to draw from: the final model of a run, or else its newest checkpoint; or any model.

    Raises:
        DataError: A run folder has neither.
        ModelError: There is no such model.
    """
    run = RunFolder(Path(source))
    if not run.config_file.is_file():
        trained = _lora_source(Path(source)) or _embedding_source(Path(source))
        return trained or ImageSource(model=find_model(source))
    config = load_config(run.config_file)
    if (of_lora := _lora_source(run.final_dir, config) or _embedding_source(run.final_dir, config)) is not None:
        return of_lora
    if run.final_dir.is_dir():
        return ImageSource(model=final_model_of(config, run.final_dir), run_config=config)
    steps = run.complete_steps()
    if not steps:
        raise DataError(f"{run.root}: the run has no final model and no complete checkpoint yet; train it first")
    say(f"the run is not finished: drawing from its checkpoint of step {steps[-1]}")
    checkpoint = run.checkpoint_dir(steps[-1])
    if config.textual_inversion.enabled:
        return ImageSource(model=_with_word(config, word_of_checkpoint(checkpoint, config)), run_config=config)
    model = model_of(config)
    if config.lora.enabled:
        files = tuple(sorted(checkpoint.glob("*.safetensors")))
        return ImageSource(
            model=model, lora=lora_of_checkpoint(checkpoint, config), lora_files=files, run_config=config
        )
    return ImageSource(model=model, checkpoint=checkpoint, run_config=config)


def _embedding_source(folder: Path, run_config: Config | None = None) -> ImageSource | None:
    """Return the base model with the word if a folder holds an embedding, as ``final/`` of Textual Inversion does."""
    file = folder / EMBEDDING_FILE
    if not file.is_file():
        return None
    word = read_embedding(file)
    if run_config is not None:
        return ImageSource(model=_with_word(run_config, word), run_config=run_config)
    if not (base := read_base(file)):
        raise DataError(f"{file}: does not name its base model; draw from the run folder instead")
    return ImageSource(model=with_words(find_model(**base), [word]))


def _with_word(config: Config, word: NewWord) -> ModelFolder:
    """Return the base model of a run of Textual Inversion with the word as it was learned."""
    return with_words(find_model(**config.model.model_dump(), cache_dir=config.cache_dir), [word])


def _lora_source(folder: Path, run_config: Config | None = None) -> ImageSource | None:
    """Return the base model and the adapters if a folder holds a LoRA, as ``final/`` of a LoRA run does."""
    if not (folder / LORA_FILE).is_file():
        return None
    lora = read_lora(folder / LORA_FILE)
    if run_config is None and not lora.base:
        raise DataError(f"{folder / LORA_FILE}: does not name its base model; draw from the run folder instead")
    model = find_model(**lora.base) if run_config is None else model_of(run_config)
    return ImageSource(model=model, lora=lora, lora_files=(folder / LORA_FILE,), run_config=run_config)
