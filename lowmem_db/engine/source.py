"""The model that images are drawn from: a model on disk, with what a run has trained."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lowmem_db import out_of_memory
from lowmem_db.adaptation.embeddings import word_of_checkpoint
from lowmem_db.adaptation.lora_file import LoraFile, lora_of_checkpoint, put_into, read_lora
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config, ModelConfig, ObjectiveConfig
from lowmem_db.console import quoted, say
from lowmem_db.data.batches import PromptTable
from lowmem_db.engine.checkpoint_weights import checkpoint_weights, trained_components
from lowmem_db.errors import CheckpointError, DataError, ModelError, StorageError
from lowmem_db.memory.drawing import load_all
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.embedding_file import read_base, read_embedding, words_beside
from lowmem_db.models.finding import (
    final_model_of,
    find_base,
    find_model,
    find_suggested,
    with_words,
    with_words_beside,
)
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.new_words import NewWord
from lowmem_db.models.text_encoders import embed_prompts
from lowmem_db.storage.checksums import MANIFEST
from lowmem_db.storage.places import EMBEDDED, EMBEDDING_FILE, INDEX, LORA_FILE
from lowmem_db.storage.run_folder import RunFolder

_Result = TypeVar("_Result")
_ADVICE = re.compile(r"; (delete it|download (the model|it) again|get the file again.*)$")
"""What messages advise where a file has been damaged that somebody else has made."""


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A model to draw from.

    Attributes:
        model: The folder with its components.
        checkpoint: Checkpoint of an unfinished run, whose weights replace those of the folder, or None.
        lora: Adapters to add to the components, or None.
        lora_files: The files with the adapters.
        run_config: Configuration of its run, or None.
        stream_weights: Whether its weights stream through the device. Default: as they did in its run.
    """

    model: ModelFolder
    checkpoint: Path | None = None
    lora: LoraFile | None = None
    lora_files: tuple[Path, ...] = ()
    run_config: Config | None = None
    stream_weights: bool | None = None

    @property
    def trained_files(self) -> tuple[Path, ...]:
        """Files that the images depend on, besides those of the model."""
        return self.lora_files if self.checkpoint is None else tuple(sorted(self.checkpoint.glob("*.safetensors")))

    @property
    def is_embedded(self) -> bool:
        """Whether it is a model in this package, or was trained on one."""
        base = self.model.name if self.run_config is None else self.run_config.model.base
        return base in EMBEDDED

    @property
    def resolution(self) -> int:
        """The side length, in pixels, of its run, or the one the model was trained for."""
        return self.model.resolution if self.run_config is None else self.run_config.data.resolution

    @property
    def objective(self) -> ObjectiveConfig | None:
        """The run's changes to the noise process and the prediction, or None if the model has not been trained."""
        if self.run_config is None:
            return None if self.lora is None else ObjectiveConfig()
        return self.run_config.objective

    def load(self, component: str, device: torch.device, dtype: torch.dtype) -> Any:
        """Load a component with its trained weights or adapters."""
        module = self.model.load(component, device, dtype)
        self._take_trained(module, component)
        return module

    @property
    def streams_weights(self) -> bool:
        """Whether its weights stream through the device: as asked for, or as they did in its run."""
        if self.stream_weights is not None:
            return self.stream_weights
        return self.run_config is not None and bool(self.run_config.memory.stream_weights)

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> Denoiser:
        """Load the denoiser, without text encoders."""
        family = self.model.family
        return Denoiser(family, self._load_all((family.denoiser,), device, dtype))

    def embed(self, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> PromptTable:
        """Return the text encoders' embeddings of prompts."""
        text_encoders = self._load_all(self.model.family.text_encoders, device, dtype)
        return embed_prompts(self.model, text_encoders, prompts)

    def _load_all(self, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
        load, streamed = partial(self.load, dtype=dtype), self.streams_weights
        return load_all(self.model.family, names, load, device, streamed=streamed)

    def _take_trained(self, module: nn.Module, component: str) -> None:
        """Put what a run has trained into a component: adapters, or the weights of its checkpoint.

        If the run keeps a moving average, the checkpoint's average is used.
        """
        if self.lora is not None:
            put_into(component, module, self.lora)
        if (
            self.checkpoint is not None
            and self.run_config is not None
            and component in trained_components(self.checkpoint)
        ):
            _load(module, checkpoint_weights(self.checkpoint, component, self.run_config), self.checkpoint)


def _load(module: nn.Module, state: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Load the weights of a checkpoint.

    Raises:
        CheckpointError: They do not belong to this model.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint}: does not fit the base model of its run ({reason}); delete {checkpoint} to draw from an "
            "older one"
        ) from error


Step = int | Literal["final"]
"""A checkpoint of a run by its step, or its final model."""


def find_source(source: str, *, step: Step | None = None, base: str | None = None) -> ImageSource:
    """Find a model to draw from: a run at some step, a LoRA, or any model.

    Args:
        source: A run folder, a folder with a LoRA, or anything that ``model.base`` accepts.
        step: A checkpoint of the run, or ``final``. Default: the final model, or else the newest checkpoint.
        base: Where the model is that it was trained on. Default: where its run says or, for a LoRA without a run, the
            local model whose content key its file holds.

    Raises:
        DataError: A run folder has no model, or not of this step; an argument has no effect.
        ModelError: There is no such model, or the base has other bytes.
    """
    run = RunFolder(Path(source))
    if not run.config_file.is_file():
        if step is not None:
            raise DataError(f"--step: {step}, but {source} is not a run, which has checkpoints; leave it out")
        return _source_outside_runs(source, base)
    config = load_config(run.config_file)
    if step in (None, "final"):
        with _damage_in_final_told(run):
            if (run.final_dir / LORA_FILE).is_file():
                return _lora_source(run.final_dir / LORA_FILE, config, run, base)
            if (run.final_dir / EMBEDDING_FILE).is_file():
                return _embedding_source(run.final_dir / EMBEDDING_FILE, config, base, run)
            if run.final_dir.is_dir():
                _refuse_base(base, run.final_dir)
                _remark_on_age(run.final_dir)
                return ImageSource(model=final_model_of(config, run.final_dir), run_config=config)
    chosen = choose_step(run, step)
    if step is None:
        say(f"the run is not finished: drawing from its checkpoint of step {chosen}")
    checkpoint = run.checkpoint_dir(chosen)
    if config.textual_inversion.enabled:
        word = word_of_checkpoint(checkpoint, config)
        return ImageSource(model=_with_word(config, word, base, str(run.root)), run_config=config)
    if config.lora.enabled:
        files = tuple(sorted(checkpoint.glob("*.safetensors")))
        model = _base(config.model, base, str(run.root), config)
        return ImageSource(
            model=model, lora=lora_of_checkpoint(checkpoint, config), lora_files=files, run_config=config
        )
    model = _base(config.model, base, str(run.root), config, exact=True)
    return ImageSource(model=model, checkpoint=checkpoint, run_config=config)


@contextmanager
def _damage_in_final_told(run: RunFolder) -> Iterator[None]:
    """Say of a damaged final model how its run writes it again; nobody can download it."""
    try:
        yield
    except (ModelError, StorageError) as error:
        found = _ADVICE.search(str(error))
        if found is None or str(run.final_dir) not in str(error):
            raise
        if steps := run.complete_steps():
            way_out = (
                f"draw with a checkpoint: --step {steps[-1]}; or delete {run.final_dir} and write it again: lowmem-db "
                f"train {quoted(run.config_file)} --resume"
            )
        else:
            way_out = f"the run has no checkpoint to write it from; train again: lowmem-db train {run.config_file}"
        raise type(error)(f"{str(error)[: found.start()]}; {way_out}") from error


def streamed_if_needed(source: ImageSource, use: Callable[[ImageSource], _Result], device: torch.device) -> _Result:
    """Use a model; out of a card's memory, use it again with streamed weights, unless that was ruled out.

    Args:
        source: The model.
        use: Loads and uses it.
        device: Device to compute on.

    Raises:
        BudgetError: There is not enough memory for a single image.
    """
    try:
        return use(source)
    except Exception as error:
        has_more_to_try = not source.streams_weights and source.stream_weights is None
        if device.type != "cuda" or not has_more_to_try or out_of_memory.place_of(error) != "device":
            raise
        reason = out_of_memory.reason_of(error)
        out_of_memory.forget(error)
    say(f"{source.model.name}: out of memory ({reason}); continuing with streamed weights")
    return use(replace(source, stream_weights=True))


def _source_outside_runs(source: str, base: str | None) -> ImageSource:
    path = Path(source)
    file = path if path.name == LORA_FILE else path / LORA_FILE
    if file.is_file() and not (path / INDEX).is_file():
        return _lora_source(file, None, None, base)
    if (path / EMBEDDING_FILE).is_file() and not (path / INDEX).is_file():
        return _embedding_source(path / EMBEDDING_FILE, None, base)
    model = find_model(source)
    _refuse_base(base, model.path)
    return ImageSource(model=model)


def choose_step(run: RunFolder, step: Step | None) -> int:
    """Return the step of a complete checkpoint: the one asked for, or the newest.

    Raises:
        DataError: There is none.
    """
    steps = run.complete_steps()
    has_final = [*steps, *(["final"] if run.final_dir.is_dir() else [])]
    if not has_final:
        raise DataError(f"{run.root}: the run has no final model and no complete checkpoint yet; train it first")
    if step is not None and step not in steps:
        raise DataError(
            f"--step: {step}, but {run.root} has no such checkpoint; allowed: {', '.join(map(str, has_final))}. A run "
            "keeps the newest checkpointing.keep checkpoints"
        )
    return steps[-1] if step is None else int(step)


def _refuse_base(base: str | None, model: Path) -> None:
    if base is not None:
        raise DataError(f"--base: {base} has no effect, because {model} is a complete model; leave it out")


def _base(
    trained_on: ModelConfig | None, given: str | None, of: str, config: Config | None, *, exact: bool = False
) -> ModelFolder:
    cache_dir = None if config is None else config.cache_dir
    return find_base(trained_on, given, of=of, cache_dir=cache_dir, exact=exact)


def _embedding_source(file: Path, config: Config | None, base: str | None, run: RunFolder | None = None) -> ImageSource:
    """Return the base model with the word of an embedding, as ``final/`` of Textual Inversion has it."""
    word = read_embedding(file)
    if config is not None:
        trained_on = with_words_beside(config.model, file.parent)
        own = config.model_copy(update={"model": trained_on})
        return ImageSource(model=_with_word(own, word, base, str(file if run is None else run.root)), run_config=config)
    model = find_suggested(read_base(file), of=f"{file.parent} is an embedding", given=base)
    return ImageSource(model=with_words(model, [word]))


def _with_word(config: Config, word: NewWord, base: str | None, of: str) -> ModelFolder:
    """Return the base model of a run of Textual Inversion with the word as it was learned."""
    return with_words(_base(config.model, base, of, config), [word])


def _lora_source(file: Path, config: Config | None, run: RunFolder | None, base: str | None) -> ImageSource:
    """Return the base model and the adapters of a file, as ``final/`` of a LoRA run has it."""
    lora = read_lora(file)
    owner = config or _config_of_owner(file.parent)
    if owner is None:
        model = find_suggested(lora.base, of=f"{file.parent} is a LoRA", given=base)
        model = with_words(model, [read_embedding(each) for each in words_beside(file.parent)])
    else:
        trained_on = with_words_beside(owner.model, file.parent)
        model = _base(trained_on, base, str(file if run is None else run.root), owner)
    return ImageSource(model=model, lora=lora, lora_files=(file,), run_config=config)


def _config_of_owner(folder: Path) -> Config | None:
    """Return the configuration of the run if this is its ``final/``."""
    run = RunFolder(folder.absolute().parent)
    is_final = folder.absolute() == run.final_dir and run.config_file.is_file()
    return load_config(run.config_file) if is_final else None


def _remark_on_age(final: Path) -> None:
    if not (final / MANIFEST).is_file():
        say(f"{final}: was written by an older version without checksums, so its files are not verified")
