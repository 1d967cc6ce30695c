"""A module imports only from layers below its own: the contracts in ``pyproject.toml``."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    program = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(config)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_contracts_are_kept() -> None:
    outcome = lint_imports(REPOSITORY / "pyproject.toml")
    assert outcome.returncode == 0, outcome.stdout
    assert " kept, 0 broken" in outcome.stdout


def test_a_broken_contract_is_noticed(tmp_path: Path) -> None:
    config = tmp_path / "upside_down.toml"
    config.write_text(
        "[tool.importlinter]\nroot_packages = ['lowmem_db']\n[[tool.importlinter.contracts]]\nname = 'upside down'\n"
        "type = 'layers'\ncontainers = ['lowmem_db']\nlayers = ['errors', 'cli']\n"
    )
    outcome = lint_imports(config)
    assert outcome.returncode == 1
    assert "1 broken" in outcome.stdout


def imports_of(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield every module of the package that a file imports, wherever in it, and whether that is inside a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    late = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lowmem_db":
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else str(node.module), id(node) in late


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted((REPOSITORY / "lowmem_db").rglob("*.py"))
MODULES = {module_of(file): file for file in FILES}
LIGHT = ("lowmem_db", "lowmem_db.api", "lowmem_db.cli")
"""What must not load torch before it is needed, and therefore imports inside functions."""


def test_no_modules_import_each_other() -> None:
    graph = {name: {other for other, _ in imports_of(file)} for name, file in MODULES.items() if name not in LIGHT}
    tuple(TopologicalSorter(graph).static_order())


def test_a_circle_is_noticed() -> None:
    with pytest.raises(CycleError):
        tuple(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_imports_inside_functions_hide_nothing() -> None:
    late = {name for name, file in MODULES.items() if any(is_late for _, is_late in imports_of(file))}
    assert {name for name in late if not name.startswith(("lowmem_db.api", "lowmem_db.cli"))} <= {
        "lowmem_db",
        "lowmem_db.run.new",  # both tell of typos before torch is loaded
        "lowmem_db.run.photos",
    }
