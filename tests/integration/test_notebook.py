"""The Colab notebook, run from its first cell to its last."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "notebooks" / "lowmem_db_colab.ipynb"
QUICK_DEMO = [
    "training.lr_warmup_steps=0",
    "training.max_train_steps=2", "prior.num_class_images=2", "prior.num_inference_steps=2", "sampling.num_images=1",
    "sampling.num_inference_steps=2", "data.num_crops=1",
]  # fmt: skip
STOP_WHERE_A_COMMAND_FAILS = """
def checked(command):
    import subprocess
    subprocess.run(get_ipython().var_expand(command, depth=1), shell=True, check=True)

get_ipython().system = checked
"""


def settings(folder: Path, model: Path) -> str:
    """A cell after the notebook's own settings, as for a user who wants a tiny model on a CPU."""
    overrides = [
        "training.lr_warmup_steps=0",
        f"model.base={model}", "training.max_train_steps=2", "prior.num_class_images=2", "sampling.num_images=1",
        "prior.num_inference_steps=2", "sampling.num_inference_steps=2", "data.resolution=32", "data.num_crops=1",
        "device=cpu",
    ]  # fmt: skip
    values = {
        "FOLDER": str(folder),
        "CONFIG": "configs/demo.yaml",
        "PROMPTS": ["a sks dog"],
        "OVERRIDES": overrides,
        "DEMO_OVERRIDES": [*QUICK_DEMO, "device=cpu"],
    }
    return "\n".join(f"{name} = {value!r}" for name, value in values.items()) + STOP_WHERE_A_COMMAND_FAILS


def test_notebook_is_kept_without_outputs_and_is_valid() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]


def test_notebook_runs_to_the_end(
    tiny_model: Path, photos_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "drive"
    folder.mkdir()
    (folder / "photos").symlink_to(photos_dir)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    position = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(settings(folder, tiny_model)))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    assert (folder / "demo" / "final" / "model_index.json").is_file()
    assert (folder / "run" / "final" / "model_index.json").is_file()
    assert (folder / "images" / "grid.png").is_file()
    assert (folder / "model.safetensors").stat().st_size > 0
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 3
