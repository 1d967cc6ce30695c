"""A module imports only from layers below its own: the contracts in ``pyproject.toml``."""

import os
import subprocess
import sys
from pathlib import Path

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
