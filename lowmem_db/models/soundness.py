"""One check of a model's files against each other, before anything is drawn: weights, variants, configurations.

Only configurations and the headers of weight files are read.
"""

import difflib
from pathlib import Path

from lowmem_db.errors import ModelError
from lowmem_db.models.files import (
    WEIGHT_SUFFIXES,
    check_header,
    read_json,
    variant_of,
    weight_files,
)
from lowmem_db.models.folder import ModelFolder

_INDEX = ".index.json"


def check_files(model: ModelFolder) -> None:
    """Refuse a model whose files do not belong together.

    Raises:
        ModelError: A component has no weights, not in the variant asked for, or only pickled ones; a file is cut off,
            missing, or of another kind; or the configurations do not fit each other.
    """
    for component in model.family.with_weights:
        _check_weights(model, component)
    if problems := model.family.problems(model):
        raise ModelError("\n".join(f"model.base: {model.path / problem}" for problem in problems))


def _check_weights(model: ModelFolder, component: str) -> None:
    folder, variant = model.folder_of(component), model.variant_of(component)
    everything = [file for file in sorted(folder.iterdir()) if file.suffix in WEIGHT_SUFFIXES]
    if not everything:
        raise ModelError(f"model.base: {folder} has no weights; allowed: a .safetensors file")
    files = weight_files(folder, variant)
    if not files:
        raise _missing_variant(variant, folder, everything)
    if {file.suffix for file in files} == {".bin"} and not model.allow_pickle:
        raise ModelError(
            f"model.base: {folder} has only pickled weights, which can run code when they are read; "
            "use a safetensors version, or set model.allow_pickle=true (they are then read with weights_only=True)"
        )
    _check_shards(folder, files)
    for file in files:
        check_header(file)


def _missing_variant(variant: str | None, folder: Path, found: list[Path]) -> ModelError:
    there = sorted({variant_of(file.name) or "" for file in found})
    names = ", ".join(file.name for file in found)
    if variant is None:
        return ModelError(
            f"model.base: {folder} has weights only as variants ({names}); allowed: weights without a variant, or its "
            f"name. Set model.variant={there[0]}"
        )
    near = difflib.get_close_matches(variant, there, n=1)
    way_out = f"Set model.variant={near[0]}" if near and near[0] else "Leave model.variant out"
    return ModelError(
        f"model.variant: {variant}, but {folder} has no such weights (only {names}); allowed: a variant that "
        f"every component has. {way_out}, or download the missing files"
    )


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Refuse weights in several files if some of these are missing."""
    names = {file.name for file in folder.iterdir()}
    for index in sorted(folder.glob(f"*{_INDEX}")):
        wanted = {name for name in read_json(index).get("weight_map", {}).values() if isinstance(name, str)}
        if not wanted & {file.name for file in files}:
            continue  # another variant's
        if missing := sorted(wanted - names):
            raise ModelError(
                f"model.base: {folder} lacks {', '.join(missing)}, which {index.name} names; allowed: all of them. "
                "Download the model again"
            )
