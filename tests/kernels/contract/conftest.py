"""Contract tests of the kernels against their twins: in Triton's interpreter, or on a CUDA device.

`test_kernels_in_interpreter.py` runs this folder in a process of its own, because Triton reads its switch at import.
What takes the interpreter more than a few seconds is slow there; `make kernels-contract` runs that too. Elsewhere the
folder is collected only where there is a CUDA device, and marked `gpu`.
"""

import pytest
import torch
from kernel_contract import INTERPRETING

if not INTERPRETING and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    if not INTERPRETING:
        for item in items:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETING else "cuda")
