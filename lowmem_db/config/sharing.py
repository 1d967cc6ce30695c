"""What of a configuration may leave the machine: everything but folders, and names that tell whose it is."""

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

PRIVATE_FIELDS = frozenset(
    ("output_dir", "cache_dir", "instance_dir", "class_dir", "copy_to", "hub_model_id", "wandb_project")
)
"""Names of fields that are left out."""
_MODELS = frozenset(("base", "vae", "embeddings", "encoder", "_name_or_path", "name_or_path"))


def shareable(value: Any, name: str = "") -> Any:
    """Return a tree of fields without private ones; a model on this machine keeps the last part of its path.

    Args:
        value: Fields, as in ``config.yaml``.
        name: The field that holds them.
    """
    if isinstance(value, Mapping):
        return {key: shareable(inner, str(key)) for key, inner in value.items() if key not in PRIVATE_FIELDS}
    if isinstance(value, list | tuple):
        return [shareable(item, name) for item in value]
    if isinstance(value, str | Path) and name in _MODELS:
        return public_name(str(value))
    return value


def public_name(model: str) -> str:
    """Return the name of a model without folders of this machine; an identifier of the hub stays."""
    kind, separator, place = model.rpartition("=")  # an encoder: dino=FOLDER
    return f"{kind}{separator}{PureWindowsPath(place).name}" if is_path(place) or _exists(place) else model


def is_path(text: str) -> bool:
    """Return whether a text is a path rather than a word or an identifier of the hub."""
    return text.startswith(("/", "~", ".")) or "\\" in text or text[1:3] in (":/", ":\\") or text.count("/") > 1


def _exists(text: str) -> bool:
    try:
        return "/" in text and Path(text).exists()
    except OSError:
        return False
