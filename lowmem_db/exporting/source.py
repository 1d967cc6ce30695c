"""The model to export: the final model of a run, or any model."""

from dataclasses import dataclass
from pathlib import Path

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.errors import ModelError
from lowmem_db.models.embedding_file import EMBEDDING_FILE
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.storage.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A model to export.

    Attributes:
        name: The name of its run or folder.
        model: Its components.
        config: Configuration of its run, or None.
    """

    name: str
    model: ModelFolder
    config: Config | None = None


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
            f"{run.root}: the run has no final model yet; finish it with: lowmem-db train {run.config_file} --resume"
        )
    config = load_config(run.config_file)
    if config.textual_inversion.enabled:
        raise ModelError(
            f"{run.root}: holds a learned embedding, which other programs load as it is: copy "
            f"{run.final_dir / EMBEDDING_FILE}; AUTOMATIC1111 and ComfyUI take the name of the file as the word"
        )
    return ExportSource(name=name, model=find_model(str(run.final_dir)), config=config)


def refuse_existing(out: Path) -> None:
    """Make sure that nothing is overwritten.

    Raises:
        ModelError: ``out`` exists.
    """
    if out.exists():
        raise ModelError(f"--out: {out} exists and will not be overwritten; choose another path, or delete it")
