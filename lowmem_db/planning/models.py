"""The model a plan is made for: its configuration files are enough, its weights may be missing."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from lowmem_db.config.schema import ModelConfig
from lowmem_db.console import say
from lowmem_db.errors import ModelError
from lowmem_db.models.single_file import recognise
from lowmem_db.models.source import CONFIGS_DIR, DEMO_DIR, ModelFolder, find_family

_KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd21_base",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl_base",
}


def find_configuration(config: ModelConfig) -> ModelFolder:
    """Find the configuration of ``model.base``: the demo's, a folder's, a file's, one downloaded, or one known here.

    Raises:
        ModelError: They are nowhere, or no denoiser is among them.
    """
    if Path(config.base).is_file():
        model = recognise(Path(config.base))
        say(model.remark)
        return model
    path = _find(config)
    for component in ("unet", "text_encoder", "vae", "scheduler"):
        if not (path / component).is_dir():
            raise ModelError(
                f"model.base: {config.base} lacks {component}; a plan needs the configuration files of a folder in "
                "diffusers' layout, not its weights"
            )
    return ModelFolder(name=config.base, path=path, family=find_family(path))


def _find(config: ModelConfig) -> Path:
    if config.base == "demo":
        return DEMO_DIR
    if Path(config.base).is_dir():
        return Path(config.base)
    try:
        return Path(snapshot_download(config.base, revision=config.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        if config.base in _KNOWN:
            return CONFIGS_DIR / _KNOWN[config.base]
    raise ModelError(
        f"model.base: {config.base!r} is no folder, is no file, is not downloaded and is none whose configuration is "
        f"known here; download it (hf download {config.base}), name a folder, or plan for one of: demo, "
        + ", ".join(_KNOWN)
    )
