"""The contract tests of the kernels on a card, where the repository's tests lie beside this package."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Row

FOLDER = Path(__file__).parents[2] / "tests" / "kernels" / "contract"
_LIMIT_SECONDS = 60.0


def contract_tests(setting: Setting) -> Row:
    """Run them in a process of their own: a kernel that faults takes its card's context with it.

    Raises:
        AssertionError: Tests failed, and the message names them; or none was run.
    """
    if (reason := _why_not(setting)) is not None:
        return {"skipped": reason}
    own = ["-c", os.devnull, f"--rootdir={FOLDER}", f"--confcutdir={FOLDER}"]  # nothing else need be installed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *own, str(FOLDER)]
    try:
        run = subprocess.run(command, env=_environment(), capture_output=True, text=True,
                             timeout=_LIMIT_SECONDS, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {
            "skipped": f"not done after {_LIMIT_SECONDS:.0f} s; run: python -m pytest -m gpu tests/kernels/contract"
        }
    if run.returncode != 0:
        raise AssertionError(_failures(run.stdout) or _in_a_line(run.stdout + run.stderr))
    if (passed := re.search(r"(\d+) passed", run.stdout)) is None:
        raise AssertionError(f"no test was run: {_in_a_line(run.stdout)}")
    return {"passed": int(passed[1])}


def _why_not(setting: Setting) -> str | None:
    if not setting.is_cuda:
        return "no card; Triton's interpreter runs them: make kernels-contract"
    if not FOLDER.is_dir():
        return "not part of the wheel; run bench in a clone of the repository"
    missing = [name for name in ("pytest", "triton") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; pip install {' '.join(missing)}" if missing else None


def _environment() -> dict[str, str]:
    """Return this process's environment, with the modules it found on its own path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _failures(output: str) -> str:
    return ", ".join(re.findall(r"^(?:FAILED|ERROR) \S*?(?:::)?([^\s:]+)(?: - .*)?$", output, flags=re.MULTILINE))


def _in_a_line(output: str) -> str:
    return " ".join(output.split())[-200:]
