"""What `make audit` makes of the answers of pip and pip-audit."""

import subprocess

import pytest

from tools.audit import audit


def answers(*results: tuple[int, str]):
    waiting = iter(results)

    def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
        code, text = next(waiting)
        return subprocess.CompletedProcess(command, code, stdout=text, stderr="")

    return run


@pytest.mark.parametrize(
    ("results", "code", "part"),
    [
        ([(0, ""), (0, "No known vulnerabilities found")], 0, "No known"),
        ([(0, ""), (1, "Found 1 known vulnerability in 1 package")], 1, "Found 1"),
        ([(1, "x\nERROR: no matching distribution")], 2, "nothing was checked: ERROR: no matching distribution"),
        ([(0, ""), (1, "requests.exceptions.ConnectionError: no")], 2, "the service cannot be reached, so nothing was"),
    ],
)
def test_report(results: list[tuple[int, str]], code: int, part: str) -> None:
    found = audit(answers(*results))
    assert found[0] == code
    assert part in found[1]
