"""The Colab notebook, run from its first cell to its last."""

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.original_models import write_original_model

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "notebooks" / "lowmem_db_colab.ipynb"
QUICK_DEMO = [
    "training.lr_warmup_steps=0",
    "training.max_train_steps=2", "prior.num_class_images=2", "prior.class_prompts=[]",
    "prior.num_inference_steps=2", "sampling.num_images=1",
    "sampling.num_inference_steps=2", "data.num_crops=1",
]  # fmt: skip
STOP_WHERE_A_COMMAND_FAILS = """
def checked(command):
    import subprocess
    done = subprocess.run(get_ipython().var_expand(command, depth=1), shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

get_ipython().system = checked
"""


def settings(folder: Path, model: Path) -> str:
    """A cell after the notebook's own settings, as for a user who wants a tiny model on a CPU."""
    overrides = [
        "training.lr_warmup_steps=0",
        f"model.base={model}", "training.max_train_steps=2", "prior.num_class_images=2", "prior.class_prompts=[]",
        "sampling.num_images=1", "prior.num_inference_steps=2", "sampling.num_inference_steps=2",
        "data.resolution=32", "data.num_crops=1", "device=cpu",
    ]  # fmt: skip
    values = {
        "FOLDER": str(folder),
        "DISK": str(folder.parent / "disk"),
        "SUBJECT": "toy",
        "CONFIG": "demo",
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


@pytest.mark.long
@pytest.mark.timeout(1800)  # a kernel starts, trains and draws; longer where the machine does other things too
def test_notebook_runs_to_the_end(photos_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "drive"
    (folder / "toy").mkdir(parents=True)
    (folder / "toy" / "photos").symlink_to(photos_dir)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    position = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(
        position + 1, nbformat.v4.new_code_cell(settings(folder, write_original_model(tmp_path / "base", "sd1")))
    )
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    disk, kept = tmp_path / "disk", folder / "toy" / "demo-1"
    assert (disk / "demo" / "final" / "model_index.json").is_file()
    assert (disk / "toy" / "demo-1" / "final" / "model_index.json").is_file()
    assert [path.name for path in (kept / "checkpoints").iterdir()] == ["step-000002"]
    assert (kept / "images" / "grid.png").is_file()
    assert (folder / "toy" / "toy-demo-1.safetensors").stat().st_size > 0
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 3


RECORDED = """
asked = []
get_ipython().run_line_magic = lambda name, line, *rest: asked.append(f"%{name} {get_ipython().var_expand(line)}")
"""


@pytest.mark.parametrize(("torchao", "is_removed"), [("0.10.0", True), ("0.17.0", False), (None, False)])
def test_install_cell_installs_although_a_clone_is_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchao: str | None, is_removed: bool
) -> None:
    """As on Colab: no command of that name, a folder of that name, an old torchao, and the package importable."""
    (tmp_path / "lowmem_db").mkdir()
    if torchao is not None:
        found = tmp_path / f"torchao-{torchao}.dist-info"
        found.mkdir()
        (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchao\nVersion: {torchao}\n")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    install = next(cell for cell in cells if cell.cell_type == "code" and "%pip install" in cell.source)
    settings = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    notebook = nbformat.v4.new_notebook()
    answer = nbformat.v4.new_code_cell("print('\\n'.join(asked))")
    notebook.cells = [settings, nbformat.v4.new_code_cell(RECORDED), install, answer]
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    lines = notebook.cells[-1].outputs[0].text.splitlines()
    installs = r'%pip install --quiet --constraint keep.txt "lowmem-db\[[^]]*lora[^]]*\] @ git\+https://\S+/lowmem-db"'
    assert re.fullmatch(installs, lines[0])
    assert (tmp_path / "keep.txt").read_text() == f"torch=={metadata.version('torch')}\n"
    assert lines[1:] == (["%pip uninstall --quiet --yes torchao"] if is_removed else [])


def test_menu_has_a_configuration_for_each_entry_that_fits_the_card() -> None:
    """The plans themselves are tests of the configurations; ``slow`` there."""
    source = next(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if "@param [" in cell.source)
    menu = re.search(r"CONFIG = .*@param (\[.*\])", source)
    assert menu is not None
    for name in json.loads(menu[1]):
        assert name.endswith("_t4")
        assert (REPOSITORY / "configs" / f"{name}.yaml").is_file()
