"""What NVIDIA's libraries are told before torch loads them, and what the driver of this machine says; without torch."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from lowmem_db.errors import ConfigError

_VERSION_FILE = Path("/proc/driver/nvidia/version")
_PROGRAM = "nvidia-smi"
_SECONDS = 20
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name since torch 2.9, and the one before it."""
_EXPANDABLE = "expandable_segments:True"


def set_variables() -> None:
    """Let cuBLAS compute the same bits each time, and let the allocator grow its segments; before torch is imported.

    What the user has set stays. Windows has no expandable segments.
    """
    os.environ.setdefault(_CUBLAS, _DETERMINISTIC_WORKSPACES[0])
    if sys.platform != "win32" and not any(name in os.environ for name in _ALLOCATOR):
        os.environ.update(dict.fromkeys(_ALLOCATOR, _EXPANDABLE))


def check_variables() -> None:
    """Refuse a setting of cuBLAS under which two equal steps may end with different bits.

    Raises:
        ConfigError: It is set to something else; the message says what is allowed.
    """
    found = os.environ.get(_CUBLAS)
    if found not in _DETERMINISTIC_WORKSPACES:
        said = "is not set" if found is None else f"{found!r} lets results change from run to run"
        raise ConfigError(
            f"{_CUBLAS}: {said}; allowed: {', '.join(_DETERMINISTIC_WORKSPACES)}. Set it before Python starts, or "
            "import lowmem_db.api before anything computes"
        )


def has_expandable_segments() -> bool:
    """Say whether the allocator of a run here grows its segments, which leaves fewer gaps between tensors."""
    settings = next((os.environ[name] for name in _ALLOCATOR if name in os.environ), _EXPANDABLE)
    return sys.platform != "win32" and _EXPANDABLE in settings


@cache
def driver_version() -> str | None:
    """Return the version of the driver, or None where there is no card, or its driver does not answer."""
    if _VERSION_FILE.is_file():
        found = re.search(r"\b\d+\.\d+(\.\d+)*\b", _VERSION_FILE.read_text(encoding="utf-8", errors="replace"))
        return None if found is None else found[0]
    if shutil.which(_PROGRAM) is None:
        return None
    command = [_PROGRAM, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip().partition("\n")[0] or None


def is_in_wsl() -> bool:
    """Say whether this is Linux inside Windows, whose driver is that of Windows."""
    return sys.platform == "linux" and Path("/usr/lib/wsl/lib").is_dir()
