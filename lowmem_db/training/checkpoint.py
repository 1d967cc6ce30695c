"""Checkpoints: the list of stateful objects, saved and restored as a whole.

Random numbers, the order of the data and the learning rates need no state; they are functions of the step.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_db.adaptation.base import Stateful
from lowmem_db.console import say
from lowmem_db.errors import CheckpointError, NonFiniteError, StorageError
from lowmem_db.finite import first_not_finite
from lowmem_db.storage.checksums import check_file, check_folder
from lowmem_db.storage.run_folder import MARKER, RunFolder, read_json, write_json
from lowmem_db.storage.tensors import read_state, write_state

_STATE_FILE = "state.json"


def save_checkpoint(run: RunFolder, step: int, objects: Mapping[str, Stateful], *, data_key: str) -> Path:
    """Write the state of every object after ``step`` optimizer steps.

    Raises:
        NonFiniteError: A weight is infinite or NaN; nothing is kept.
        StorageError: The disk is full; older checkpoints are untouched.
    """

    def write(folder: Path) -> None:
        for name, stateful in objects.items():
            state = stateful.state_dict()
            _refuse_not_finite(name, state)
            write_state(folder / f"{name}.safetensors", state)
        write_json(folder / _STATE_FILE, {"step": step, "objects": sorted(objects), "data_key": data_key})

    return run.write_checkpoint(step, write)


def restore_checkpoint(run: RunFolder, step: int, objects: Mapping[str, Stateful]) -> str:
    """Restore every object to its state after ``step`` steps; return the key of the data used by then.

    Raises:
        CheckpointError: The checkpoint is damaged, or holds different objects.
    """
    folder = run.checkpoint_dir(step)
    names, data_key = _read_list(run, step)
    if names != sorted(objects):
        raise CheckpointError(
            f"{folder}: holds {', '.join(names)}, but this run has {', '.join(sorted(objects))}; resume with "
            f"the settings in {run.config_file}, or choose another output_dir"
        )
    try:
        for name, stateful in objects.items():
            stateful.load_state_dict(read_state(folder / f"{name}.safetensors"))
    except StorageError as error:
        raise CheckpointError(f"{error}; {_way_out(run, step)}") from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: cannot be restored ({reason}); {_way_out(run, step)}") from error
    return data_key


def _refuse_not_finite(name: str, state: Mapping[str, Any]) -> None:
    weights = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if (found := first_not_finite(weights)) is not None:
        raise NonFiniteError(f"{name}: {found} is infinite or NaN, so no checkpoint is written")


def _read_list(run: RunFolder, step: int) -> tuple[list[str], str]:
    """Return the names of the objects in a checkpoint, and the key of its data."""
    folder = run.checkpoint_dir(step)
    file = folder / _STATE_FILE
    try:
        if not check_file(file, folder / MARKER):
            say(f"{folder}: was written by an older version without checksums, so its files are not verified")
    except StorageError as error:
        raise CheckpointError(f"{error}; {_way_out(run, step)}") from error
    state = read_json(file)
    if not isinstance(state, dict) or state.get("step") != step:
        raise CheckpointError(f"{file}: is damaged; {_way_out(run, step)}")
    names, data_key = state.get("objects"), state.get("data_key")
    if not isinstance(names, list) or not isinstance(data_key, str) or not all(isinstance(n, str) for n in names):
        raise CheckpointError(f"{file}: is damaged; {_way_out(run, step)}")
    return names, data_key


def _way_out(run: RunFolder, damaged: int) -> str:
    """Say what to delete, and the command that continues from the last intact checkpoint."""
    older = [step for step in run.complete_steps() if step < damaged]
    whole = next((step for step in reversed(older) if _is_whole(run, step)), None)
    in_the_way = [step for step in run.complete_steps() if (-1 if whole is None else whole) < step <= damaged]
    delete = " and ".join(str(run.checkpoint_dir(step)) for step in in_the_way)
    command = f"lowmem-db train {shlex.quote(str(run.config_file))} --resume"
    goes_on = "start from scratch" if whole is None else f"continue after step {whole}, the last intact checkpoint,"
    return f"delete {delete}, then {goes_on} with: {command}"


def _is_whole(run: RunFolder, step: int) -> bool:
    try:
        check_folder(run.checkpoint_dir(step), MARKER)
    except StorageError:
        return False
    return True
