"""Copying the parts of a model that do not train: files of known kinds, and nothing from outside its folder."""

import shutil
from pathlib import Path

from lowmem_db.console import say
from lowmem_db.errors import ModelError

_TEXTS = {".json", ".txt", ".model", ".md"}
_WEIGHTS = ".safetensors"
SAMPLES_FILE = "samples.jpg"
"""Pictures beside the card of a trained model."""


def copy_known_files(source: Path, target: Path, *, root: Path, weights: bool = True) -> None:
    """Copy the configurations, vocabularies and safetensors of a folder; say which files are left out.

    Args:
        source: The folder.
        target: The folder to fill.
        root: The folder of the whole model.
        weights: Whether safetensors are copied too.

    Raises:
        ModelError: A link leads out of ``root`` to a file that is not safetensors; its content could be anybody's.
    """
    target.mkdir(parents=True, exist_ok=True)
    strangers = []
    for file in sorted(source.iterdir()):
        if file.is_dir() or file.name.startswith("."):
            continue
        if file.suffix in _TEXTS or file.name == SAMPLES_FILE:
            refuse_link_out(file, root)
            shutil.copyfile(file, target / file.name)
        elif file.suffix == _WEIGHTS and weights:
            shutil.copyfile(file, target / file.name)
        elif file.suffix != _WEIGHTS:
            strangers.append(file.name)
    if strangers:
        say(
            f"{source}: not copied, because these are no configurations, vocabularies or safetensors: {_few(strangers)}"
        )


def refuse_link_out(file: Path, root: Path) -> None:
    """Refuse a file that is, or lies behind, a link that leads out of a model's folder.

    In the cache of the hub, the files of a model are links into the folder ``blobs`` of its repository.

    Raises:
        ModelError: It is one.
    """
    home, real = root.resolve(), file.resolve()
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ModelError(f"{file}: is a link that leads out of the model's folder, to {real}; put a copy in its place")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
