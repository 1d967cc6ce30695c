"""The model to export: the final model of a run, or any model."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.console import quoted
from lowmem_db.engine.checkpoint_weights import trained_components
from lowmem_db.engine.source import ImageSource
from lowmem_db.errors import ModelError
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.models.saving import DTYPES, save_model
from lowmem_db.storage.places import EMBEDDING_FILE
from lowmem_db.storage.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A model to export.

    Attributes:
        name: The name of its run or folder.
        model: Its components.
        config: Configuration of its run, or None.
        sample: An image that the run has drawn, for the thumbnail, or None.
    """

    name: str
    model: ModelFolder
    config: Config | None = None
    sample: Path | None = None


def find_export_source(source: str) -> ExportSource:
    """Find the final model of a run, or any model.

    Args:
        source: A run folder, or anything that ``model.base`` accepts.

    Raises:
        ModelError: The run is not finished, or there is no such model.
    """
    run = RunFolder(Path(source))
    name = Path(source).resolve().name.removesuffix(".safetensors")
    if not run.config_file.is_file():
        return ExportSource(name=name, model=find_model(source))
    if not run.final_dir.is_dir():
        raise ModelError(
            f"{run.root}: the run has no final model yet; finish it with: lowmem-db train {quoted(run.config_file)} "
            f"--resume, or export a checkpoint: --step {_steps(run)}"
        )
    config = load_config(run.config_file)
    if config.textual_inversion.enabled:
        raise ModelError(
            f"{run.root}: holds a learned embedding, which other programs load as it is: copy "
            f"{run.final_dir / EMBEDDING_FILE}; AUTOMATIC1111 and ComfyUI take the name of the file as the word"
        )
    return ExportSource(name=name, model=find_model(str(run.final_dir)), config=config, sample=run.newest_sample())


@contextmanager
def source_at_step(found: ImageSource, name: str, beside: Path) -> Iterator[ExportSource]:
    """Return a context with a checkpoint of a full fine-tuning as a complete model, in a temporary folder.

    Args:
        found: A run at some step.
        name: What the model is called.
        beside: Where the temporary folder is made, because it is large.
    """
    checkpoint, config = found.checkpoint, found.run_config
    assert checkpoint is not None, f"{name} has no checkpoint"
    assert config is not None, f"{name} is no run"
    trained = {name: found.load(name, CPU, torch.float32) for name in trained_components(checkpoint)}
    with tempfile.TemporaryDirectory(dir=beside, prefix=".exporting-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        save_model(
            folder,
            found.model,
            trained,
            dtype=DTYPES[config.final.precision],
            objective=config.objective,
        )
        yield ExportSource(name=name, model=find_model(str(folder)), config=config)


def _steps(run: RunFolder) -> str:
    return " or ".join(map(str, run.complete_steps())) or "N (there is none yet)"


def refuse_existing(out: Path) -> None:
    """Make sure that nothing is overwritten.

    Raises:
        ModelError: ``out`` exists.
    """
    if out.exists():
        raise ModelError(f"--out: {out} exists and will not be overwritten; choose another path, or delete it")
