"""What ``model.base`` names, judged by names of files alone: nothing heavy is imported, so a typo is told at once."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lowmem_db.console import quoted
from lowmem_db.errors import ModelError

_EMBEDDED = Path(__file__).parents[1] / "models" / "demo"
DEMO_DIR = _EMBEDDED / "base"
EMBEDDED = {"demo": DEMO_DIR, "demo_if": _EMBEDDED / "if", "demo_if_ii": _EMBEDDED / "if_ii"}
"""The models in this package: the demo base, and the two stages of a small pixel cascade."""
EMBEDDED_GUIDANCE = 2.0
"""What they draw best with; 7.5, as for Stable Diffusion, spoils their colours."""
INDEX = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDING_FILE = "learned_embeds.safetensors"
EMBEDDINGS_DIR = "embeddings"
"""Beside a model: the learned words that it was trained with."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+\.safetensors)")
_RUN_CONFIG = "config.yaml"
_CHECKPOINT_MARKER = "COMPLETE"
_ALLOWED = "demo, demo_if, demo_if_ii, a folder in diffusers' layout, a run, a .safetensors file, owner/name"
_IN_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_NO_MODELS = {
    ".yaml": "a configuration: lowmem-db train {file}", ".yml": "a configuration: lowmem-db train {file}",
    ".zip": "an archive: unpack it first", ".gguf": "a quantized model for inference, which cannot be trained",
    ".jpg": "a picture", ".jpeg": "a picture", ".png": "a picture", ".webp": "a picture", ".txt": "a text file",
}  # fmt: skip


def place_of(base: str) -> Path | None:
    """Return the folder or the file that a model's name means on this machine, or None for a name on the hub.

    A run stands for its final model, a folder of the hub's cache for its snapshot.

    Args:
        base: As in ``model.base``.

    Raises:
        ModelError: There is nothing by that name, or it is no model; the message says what it is and what to do.
    """
    if base in EMBEDDED:
        return EMBEDDED[base]
    path = Path(base)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise ModelError(f"model.base: {base[:300]!r} cannot be read ({error}); allowed: {_ALLOWED}") from None
    if is_folder:
        return _model_in(path)
    if is_file:
        return _refuse_other_files(path)
    if path.is_symlink():
        raise ModelError(
            f"model.base: {base} is a link to {path.readlink()}, which does not exist; allowed: {_ALLOWED}"
        )
    if _is_on_hub(base):
        return None
    raise ModelError(f"model.base: {base!r} is not a folder, a file or a hub id; allowed: {_ALLOWED}{near(path)}")


def absolute_base(base: str) -> str:
    """Return a model's name so that it means the same in every working folder."""
    try:
        return str(absolute_path(Path(base))) if base not in EMBEDDED and Path(base).exists() else base
    except (OSError, ValueError):
        return base


def absolute_path(path: Path) -> Path:
    """Return an absolute path without ``..``, unless that leads somewhere else because of a link."""
    plain = Path(os.path.abspath(path))  # noqa: PTH100
    return plain if plain.resolve() == path.resolve() else path.absolute()


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run."""
    return (folder / _RUN_CONFIG).is_file()


def _is_on_hub(base: str) -> bool:
    """Return whether it may be a model or a file on the hub; what begins like a local path is not."""
    if HUB_FILE.fullmatch(base) is not None and not Path(base).parent.is_dir():
        return True
    is_id = bool(HUB_ID.fullmatch(base)) and not base.startswith(".") and not base.endswith(".safetensors")
    return is_id and not any(is_run(entry) for entry in _entries(Path(base).parent))  # runs/dgo is a typo


def _model_in(folder: Path) -> Path:
    """Return the folder of a model that a folder holds."""
    if (folder / INDEX).is_file():
        return folder
    if is_run(folder):
        return _final_of(folder)
    if (folder / LORA_FILE).is_file():
        raise _is_lora(folder, folder / LORA_FILE)
    if (snapshots := _snapshots_of(folder)) is not None:
        return _snapshot_in(folder, snapshots)
    if hint := _what_else(folder):
        raise ModelError(f"model.base: {folder} {hint}")
    return folder


def _final_of(run: Path) -> Path:
    final = run / "final"
    if (final / LORA_FILE).is_file():
        raise _is_lora(run, final / LORA_FILE)
    if (final / EMBEDDING_FILE).is_file():
        raise ModelError(
            f"model.base: {run} has learned a word ({EMBEDDING_FILE}) and no model; allowed: a complete model. Name "
            f"the base of that run, and the word beside it: model.embeddings={quoted(run)}"
        )
    if not (final / INDEX).is_file():
        raise ModelError(
            f"model.base: {run} is a run without a final model; allowed: a finished one. Finish it (lowmem-db train "
            f"{quoted(run / _RUN_CONFIG)} --resume), or export a checkpoint (lowmem-db export {quoted(run)} --step N "
            "--format diffusers) and name that folder"
        )
    return final


def _is_lora(source: Path, file: Path) -> ModelError:
    return ModelError(
        f"model.base: {source} holds a LoRA ({file.name}), which needs its base model; allowed: a complete model. "
        f"Merge it first (lowmem-db export {quoted(source)} --merge --format diffusers) and name that folder"
    )


def _snapshots_of(folder: Path) -> Path | None:
    """Return the folder of snapshots if a folder is a model in the hub's cache."""
    if folder.name == "snapshots" and any(folder.iterdir()):
        return folder
    return folder / "snapshots" if (folder / "snapshots").is_dir() else None


def _snapshot_in(folder: Path, snapshots: Path) -> Path:
    """Return the snapshot of a model in the hub's cache: the one of its branch ``main``, or the only one."""
    main = snapshots.parent / "refs" / "main"
    if main.is_file() and (of_main := snapshots / main.read_text(encoding="utf-8").strip()).is_dir():
        return of_main
    found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise ModelError(
            f"model.base: {folder} is in the hub's cache and has {len(found)} snapshots ({names}); allowed: one. Name "
            "the folder of the snapshot, or the hub id"
        )
    return found[0]


def _what_else(folder: Path) -> str:
    """Return what a folder without a model is, and which one to name instead."""
    if (folder / _CHECKPOINT_MARKER).is_file() and is_run(run := folder.parent.parent):
        return (
            f"is a checkpoint of a run; allowed: a complete model. To draw with it: lowmem-db generate {quoted(run)} "
            f"--step N; for other programs: lowmem-db export {quoted(run)} --step N"
        )
    if (folder.parent / INDEX).is_file() and (folder / "config.json").is_file():
        return f"is only the {folder.name} of a model; allowed: the whole model. Name {folder.parent}"
    entries = sorted(_entries(folder))
    inner = [entry for entry in entries if (entry / INDEX).is_file()]
    if inner:
        return f"holds no {INDEX}, but its folder {inner[0].name} does; allowed: the model's folder. Name {inner[0]}"
    if runs := [entry for entry in entries if is_run(entry)]:
        return f"is a folder of runs; allowed: one of them. Name {runs[0]}"
    if cached := [found for entry in entries if (found := _IN_HUB_CACHE.fullmatch(entry.name))]:
        return f"is a cache of models from the hub; allowed: one of them. Name {cached[0][1]}/{cached[0][2]}"
    files = [entry for entry in entries if entry.suffix == ".safetensors"]
    if files and not (folder / "config.json").is_file():
        return f"holds no {INDEX}, but {len(files)} .safetensors; allowed: the file itself. Name {files[0]}"
    return ""


def _refuse_other_files(file: Path) -> Path:
    """Return a file unless its name says that it is no model."""
    if file.name == INDEX:
        raise ModelError(f"model.base: {file} is the index of a model; allowed: its folder. Name {file.parent}")
    if file.name == LORA_FILE:
        raise _is_lora(file.parent, file)
    if (what := _NO_MODELS.get(file.suffix.lower())) is not None:
        raise ModelError(f"model.base: {file} is {what.format(file=file)}; allowed: {_ALLOWED}")
    return file


def near(path: Path) -> str:
    """Return a hint about the name that was probably meant."""
    parent = path.parent
    if not parent.is_dir():
        return f"; the folder {parent} does not exist either"
    names = [entry.name for entry in _entries(parent) if entry.is_dir() or entry.suffix == ".safetensors"]
    nearest = difflib.get_close_matches(path.name, [name for name in (*EMBEDDED, *names) if name != str(path)], n=1)
    if not nearest:
        return "" if path.is_absolute() else f"; relative paths start at {Path.cwd()}"
    return f"; did you mean {nearest[0] if nearest[0] in EMBEDDED else parent / nearest[0]}?"


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:  # not readable: no hint
        return
