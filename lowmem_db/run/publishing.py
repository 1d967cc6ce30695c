"""What of a finished run leaves the machine: its final model, card and samples, and nothing that tells whose it is."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lowmem_db.config.sharing import shareable
from lowmem_db.config.yaml_text import parse_yaml, read_text
from lowmem_db.console import quoted
from lowmem_db.errors import ModelError, StorageError
from lowmem_db.models.saving import forget_places
from lowmem_db.storage import hub
from lowmem_db.storage.checksums import MANIFEST
from lowmem_db.storage.mirroring import mirror
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_tensors, write_tensors

_SUFFIXES = (".json", ".md", ".txt", ".safetensors")


def publish(root: Path, model_id: str, *, private: bool) -> str:
    """Upload the final model of a run; return the address of its page.

    Raises:
        ModelError: The run has no final model, or the name of the repository is not allowed.
        StorageError: The hub refused the upload, or a file tells where the run lies.
    """
    hub.check_id(model_id)
    with shareable_copy(RunFolder(root)) as folder:
        return hub.upload_model(folder, model_id, root / "final", private=private)


def files_to_publish(root: Path) -> dict[str, int]:
    """Return the files that :func:`publish` sends, with their bytes.

    Raises:
        ModelError: The run has no final model.
        StorageError: A file tells where the run lies.
    """
    with shareable_copy(RunFolder(root)) as folder:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


@contextmanager
def shareable_copy(run: RunFolder) -> Iterator[Path]:
    """Return a context with a copy of the final model without paths; unchanged files are hard links.

    Raises:
        ModelError: The run has no final model.
        StorageError: A file tells where the run lies.
    """
    if not run.final_dir.is_dir():
        raise ModelError(
            f"RUN: {run.root} has no final model; allowed: a finished run. Finish it with: lowmem-db train "
            f"{quoted(run.config_file)} --resume"
        )
    with tempfile.TemporaryDirectory(dir=run.root, prefix=".sharing-") as temporary:
        folder = Path(temporary)
        mirror(run.final_dir, folder)
        (folder / MANIFEST).unlink(missing_ok=True)  # of the files before they are changed
        _unlink_texts(folder)
        forget_places(folder)
        for file in folder.rglob("*.safetensors"):
            _forget_places_in(file)
        _refuse_paths(folder, _places_of(run))
        yield folder


def _unlink_texts(folder: Path) -> None:
    """Turn hard links of small files into copies, so that changing them leaves the final model alone."""
    for file in (found for found in folder.rglob("*") if found.suffix == ".json"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)


def _forget_places_in(file: Path) -> None:
    """Write a safetensors file anew if its metadata hold a path."""
    metadata = _metadata_of(file)
    public = {name: _public(value) for name, value in metadata.items()}
    if public != metadata:
        tensors, _ = read_tensors(file)
        write_tensors(file, tensors, public)  # in place of the hard link


def _metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _public(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    changed = shareable(value)
    return text if changed == value else json.dumps(changed)


def _places_of(run: RunFolder) -> set[str]:
    """Return the folders whose names must not be in what is sent."""
    config = parse_yaml(read_text(run.config_file)) if run.config_file.is_file() else {}
    found = {str(run.root.absolute().parent), str(Path.home()), *_paths_in(config)}
    return {place for place in found if len(Path(place).parts) > 1}


def _paths_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _paths_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths_in(inner)
    elif isinstance(value, str) and Path(value).is_absolute():
        yield value


def _refuse_paths(folder: Path, places: set[str]) -> None:
    """Make sure that no text tells where the run lies."""
    needles = {place: json.dumps(place)[1:-1] for place in places}
    for file in (found for found in folder.rglob("*") if found.suffix in _SUFFIXES):
        text = json.dumps(_metadata_of(file)) if file.suffix == ".safetensors" else _text_of(file)
        told = sorted(place for place, escaped in needles.items() if place in text or escaped in text)
        if told:
            raise StorageError(
                f"{file.relative_to(folder)}: names {told[0]}, a folder of this machine, so nothing is sent; remove it "
                "from that file in final/"
            )


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
