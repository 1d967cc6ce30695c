"""The model that images are drawn from: a model on disk, with what a run has trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_db.adaptation.embeddings import word_of_checkpoint
from lowmem_db.adaptation.lora_base import find_base
from lowmem_db.adaptation.lora_file import LORA_FILE, LoraFile, lora_of_checkpoint, put_into, read_lora
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config, ObjectiveConfig
from lowmem_db.console import say
from lowmem_db.data.batches import PromptTable
from lowmem_db.errors import CheckpointError, DataError, ModelError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.embedding_file import EMBEDDING_FILE, read_base, read_embedding
from lowmem_db.models.finding import final_model_of, find_model, model_of, with_words
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.new_words import NewWord
from lowmem_db.models.text_encoders import embed_prompts
from lowmem_db.storage.checksums import MANIFEST
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
        _load(module, self.checkpoint / f"{component}.safetensors")
        if self.run_config is not None and self.run_config.ema.enabled:
            _load(module, self.checkpoint / "ema.safetensors", prefix=f"{component}.")


def _load(module: nn.Module, file: Path, prefix: str | None = None) -> None:
    """Load the weights of a checkpoint; with a prefix, only those whose names begin with it, which may be some of them.

    Raises:
        CheckpointError: They do not belong to this model.
        StorageError: The file is damaged.
    """
    state = read_state(file)
    if prefix is not None:
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        found = module.load_state_dict(state, strict=prefix is None)
        if found.unexpected_keys:
            raise KeyError(found.unexpected_keys[0])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: does not fit the base model of its run ({reason}); delete {file.parent} to draw from an older one"
        ) from error


def find_source(source: str, base: str | None = None) -> ImageSource:
    """Find a model to draw from: the final model of a run, or else its newest checkpoint; or any model.

    Args:
        source: A run folder, a LoRA, or anything that ``model.base`` accepts.
        base: The base model of a LoRA. Default: that of its run, or the local one whose content key its file holds.

    Raises:
        DataError: A run folder has neither.
        ModelError: There is no such model.
    """
    run = RunFolder(Path(source))
    if not run.config_file.is_file():
        found = _lora_source(Path(source), None, base)
        found = found or _embedding_source(Path(source), None, base)
        return found or _without_base(ImageSource(model=find_model(source)), base)
    config = load_config(run.config_file)
    of_lora = _lora_source(run.final_dir, config, base) or _embedding_source(run.final_dir, config, base)
    if of_lora is not None:
        return of_lora
    if run.final_dir.is_dir():
        _remark_on_age(run.final_dir)
        return _without_base(ImageSource(model=final_model_of(config, run.final_dir), run_config=config), base)
    steps = run.complete_steps()
    if not steps:
        raise DataError(f"{run.root}: the run has no final model and no complete checkpoint yet; train it first")
    say(f"the run is not finished: drawing from its checkpoint of step {steps[-1]}")
    checkpoint = run.checkpoint_dir(steps[-1])
    if config.textual_inversion.enabled:
        return ImageSource(model=_with_word(config, word_of_checkpoint(checkpoint, config), base), run_config=config)
    model = find_model(base) if base is not None else model_of(config, fetch=False)
    if config.lora.enabled:
        files = tuple(sorted(checkpoint.glob("*.safetensors")))
        return ImageSource(
            model=model, lora=lora_of_checkpoint(checkpoint, config), lora_files=files, run_config=config
        )
    return ImageSource(model=model, checkpoint=checkpoint, run_config=config)


def _embedding_source(folder: Path, run_config: Config | None, base: str | None) -> ImageSource | None:
    """Return the base model with the word if a folder holds an embedding, as ``final/`` of Textual Inversion does."""
    file = folder / EMBEDDING_FILE
    if not file.is_file():
        return None
    word = read_embedding(file)
    if run_config is not None:
        return ImageSource(model=_with_word(run_config, word, base), run_config=run_config)
    named = {"base": base} if base is not None else read_base(file)
    if not named:
        raise DataError(f"{file}: does not name its base model; add --base")
    return ImageSource(model=with_words(find_model(**named), [word]))


def _with_word(config: Config, word: NewWord, base: str | None) -> ModelFolder:
    """Return the base model of a run of Textual Inversion with the word as it was learned."""
    if base is not None:
        return with_words(find_model(base), [word])
    return with_words(find_model(**config.model.model_dump(), cache_dir=config.cache_dir, fetch=False), [word])


def _lora_source(folder: Path, run_config: Config | None, base: str | None) -> ImageSource | None:
    """Return the base model and the adapters if a folder holds a LoRA, as ``final/`` of a LoRA run does."""
    if not (folder / LORA_FILE).is_file():
        return None
    lora = read_lora(folder / LORA_FILE)
    owner = run_config or _config_of_owner(folder)
    if owner is None or base is not None:
        model = find_base(lora, source=str(folder), given=base)
    else:
        model = model_of(owner, fetch=False)
    return ImageSource(model=model, lora=lora, lora_files=(folder / LORA_FILE,), run_config=run_config)


def _config_of_owner(folder: Path) -> Config | None:
    """Return the configuration of the run if this is its ``final/``."""
    run = RunFolder(folder.absolute().parent)
    is_final = folder.absolute() == run.final_dir and run.config_file.is_file()
    return load_config(run.config_file) if is_final else None


def _without_base(found: ImageSource, base: str | None) -> ImageSource:
    if base is not None:
        raise ModelError(f"--base: {base} has no effect, because {found.model.name} is a whole model; leave it out")
    return found


def _remark_on_age(final: Path) -> None:
    if not (final / MANIFEST).is_file():
        say(f"{final}: was written by an older version without checksums, so its files are not verified")
