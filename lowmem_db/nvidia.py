"""What the NVIDIA driver of this machine says, asked without torch."""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

_VERSION_FILE = Path("/proc/driver/nvidia/version")
_PROGRAM = "nvidia-smi"
_SECONDS = 20


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
