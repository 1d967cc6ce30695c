"""What a run is continued from: the one list of stateful objects, saved and restored as a whole.

Random numbers, the order of the data and the learning rates need no state: they are functions of the step.
"""

from collections.abc import Mapping
from pathlib import Path

from lowmem_db.adaptation.base import Stateful
from lowmem_db.errors import CheckpointError, StorageError
from lowmem_db.storage.run_folder import RunFolder, read_json, write_json
from lowmem_db.storage.tensors import read_state, write_state

_STATE_FILE = "state.json"


def save_checkpoint(run: RunFolder, step: int, objects: Mapping[str, Stateful], *, data_key: str) -> Path:
    """Write the state of every object after ``step`` optimizer steps.

    Raises:
        StorageError: The disk is full; older checkpoints still stand.
    """

    def write(folder: Path) -> None:
        for name, stateful in objects.items():
            write_state(folder / f"{name}.safetensors", stateful.state_dict())
        write_json(folder / _STATE_FILE, {"step": step, "objects": sorted(objects), "data_key": data_key})

    return run.write_checkpoint(step, write)


def restore_checkpoint(run: RunFolder, step: int, objects: Mapping[str, Stateful]) -> str:
    """Give every object the state it had after ``step`` steps; return the key of the data the run had.

    Raises:
        CheckpointError: The checkpoint is damaged, or holds other objects.
    """
    folder = run.checkpoint_dir(step)
    state = read_json(folder / _STATE_FILE)
    if state is None or state["step"] != step:
        raise CheckpointError(f"{folder / _STATE_FILE}: is damaged; delete {folder} to continue from the one before")
    if state["objects"] != sorted(objects):
        raise CheckpointError(
            f"{folder}: holds {', '.join(state['objects'])}, this run has {', '.join(sorted(objects))}; resume with "
            f"the settings in {run.config_file}, or choose another output_dir"
        )
    try:
        for name, stateful in objects.items():
            stateful.load_state_dict(read_state(folder / f"{name}.safetensors"))
    except (StorageError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: cannot be restored ({reason}); delete it to continue from the one before"
        ) from error
    return state["data_key"]
