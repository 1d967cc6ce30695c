"""Looks up the installed packages in a list of known vulnerabilities, with pip-audit."""

import subprocess
import sys
from collections.abc import Callable

_FOUND, _UNREACHABLE = 1, 2
_NO_ANSWER = (
    "ConnectionError", "ConnectTimeout", "ReadTimeout", "ServiceError", "Max retries", "Name or service", "resolve",
    "HTTPError", "ProxyError",
)  # fmt: skip
_INSTALL = [sys.executable, "-m", "pip", "install", "--quiet", "pip-audit"]
_AUDIT = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--skip-editable", "--timeout", "30"]
Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def audit(run: Run) -> tuple[int, str]:
    """Return an exit code and a report: 0 nothing is known, 1 vulnerabilities, 2 nobody could be asked.

    Args:
        run: Runs a command and returns what it printed.
    """
    installed = run(_INSTALL)
    if installed.returncode:
        return _UNREACHABLE, f"audit: pip-audit cannot be installed, so nothing was checked: {_last_line(installed)}"
    found = run(_AUDIT)
    text = (found.stdout + found.stderr).strip()
    if found.returncode and any(sign in text for sign in _NO_ANSWER):
        return _UNREACHABLE, f"audit: the service cannot be reached, so nothing was checked: {_last_line(found)}"
    return (_FOUND if found.returncode else 0), text


def _last_line(result: "subprocess.CompletedProcess[str]") -> str:
    lines = (result.stdout + result.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit code {result.returncode}"


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    code, report = audit(_run)
    print(report)
    sys.exit(code)
