"""A configuration that means the same in every working folder."""

from pathlib import Path
from typing import Any

from lowmem_db.config.loading import Tree
from lowmem_db.config.schema import Config
from lowmem_db.storage.places import absolute_base, absolute_path

PATHS = ("output_dir", "cache_dir", "subject.instance_dir", "prior.class_dir", "checkpointing.copy_to")
"""Fields that hold paths."""
_NAMES = ("model.base", "model.vae")
"""Fields that name models, which may be paths."""


def with_absolute_paths(config: Config) -> Config:
    """Return a configuration whose paths do not depend on the working folder."""
    return Config.model_validate(absolute_tree(config.model_dump()))


def absolute_tree(tree: Tree) -> Tree:
    """Return a tree of fields, such as one read from a file, with absolute paths."""
    changed = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for path in (*PATHS, *_NAMES):
        *section, name = path.split(".")
        holder: Any = changed.get(section[0], {}) if section else changed
        if holder.get(name) is not None:
            absolute = absolute_base(str(holder[name])) if path in _NAMES else str(absolute_path(Path(holder[name])))
            holder[name] = absolute
    model = changed.get("model")
    if isinstance(model, dict) and model.get("embeddings"):
        model["embeddings"] = [str(absolute_path(Path(file))) for file in model["embeddings"]]
    subject = changed.get("subject")
    if isinstance(subject, dict) and subject.get("concepts"):
        subject["concepts"] = [_absolute_concept(concept) for concept in subject["concepts"]]
    return changed


def _absolute_concept(concept: Tree) -> Tree:
    paths = {name: concept[name] for name in ("instance_dir", "class_dir") if concept.get(name) is not None}
    return {**concept, **{name: str(absolute_path(Path(path))) for name, path in paths.items()}}
