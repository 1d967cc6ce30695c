"""Runs contract tests in Triton's interpreter, each file in a process of its own.

`make kernels-contract` runs those of all kernels, and all cases of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted((Path(__file__).parent / "contract").glob("test_*.py"))
QUICK = ("checks", "codec_and_rounding")


def test_there_are_contract_tests():
    assert len(FILES) >= 5


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.endswith(QUICK)], ids=lambda path: path.stem)
def test_contract(path):
    environment = os.environ | {"LOWMEM_DB_KERNELS": "interpret", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    own = f"--confcutdir={path.parent}"  # the fixtures of the other tests import diffusers, which takes long
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", own, str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
