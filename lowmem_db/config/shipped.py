"""The configurations and the photos that come with the package, found by name: ``lowmem-db train demo``.

In a wheel they lie in the package; in a clone, beside it.
"""

import shutil
from pathlib import Path
from typing import Any

from lowmem_db.config.yaml_text import parse_yaml, read_text
from lowmem_db.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
_ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
CONFIGS = _ROOT / "configs"
_PHOTOS = "examples/"


def names() -> list[str]:
    """Return the names of the configurations in this package."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def find(path: Path) -> Path:
    """Return the file of a configuration that is given by its name, such as ``demo``, or a path as it is.

    ``configs/demo.yaml`` is also found from a folder without ``configs``.
    """
    if path.stem not in names() or path.is_file():
        return path
    is_name = path.parent == Path() and not path.suffix
    is_of_clone = path.parent == Path("configs") and path.suffix == ".yaml" and not path.parent.exists()
    return CONFIGS / f"{path.stem}.yaml" if is_name or is_of_clone else path


def with_photos(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a file; one of this package finds its photos wherever it is used."""
    photos = _photos_of(tree)
    if photos is None or path.resolve().parent != CONFIGS.resolve():
        return tree
    return tree | {"subject": tree["subject"] | {"instance_dir": str(_ROOT / photos)}}


def describe(name: str) -> str:
    """Return what a configuration trains, and on which card: the first lines of its header."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = []
    for line in lines:
        if not line.removeprefix("#").strip():
            break
        header.append(line.removeprefix("#").strip())
    return " ".join(header)


def copy(name: str, folder: Path) -> list[Path]:
    """Copy a configuration into a folder, and its photos if it has some.

    Returns:
        What was written.

    Raises:
        ConfigError: There is no such configuration, or a file is in the way.
    """
    if name not in names():
        raise ConfigError(f"{name}: is not a configuration of this package; allowed: {', '.join(names())}")
    source = CONFIGS / f"{name}.yaml"
    pairs = [(source, folder / source.name)]
    if (photos := _photos_of(parse_yaml(read_text(source)))) is not None:
        pairs.append((_ROOT / photos, folder / photos))
    for _, target in pairs:
        if target.exists():
            raise ConfigError(f"{target}: exists already; choose another folder with --output, or move it away")
    for found, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, target)
        else:
            shutil.copyfile(found, target)
    return [target for _, target in pairs]


def _photos_of(tree: dict[str, Any]) -> str | None:
    """Return the photos of this package that a configuration uses."""
    subject = tree.get("subject")
    photos = subject.get("instance_dir") if isinstance(subject, dict) else None
    return photos if isinstance(photos, str) and photos.startswith(_PHOTOS) else None
