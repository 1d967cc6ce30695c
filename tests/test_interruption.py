"""A signal ends the program with exit code 130, one line and no traceback, whatever is being imported."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lowmem_db import interruption
from lowmem_db.errors import RunInterrupted
from lowmem_db.interruption import exit_on_signals, handling, stop_signals

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
SIGNAL_WHILE_IMPORTING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.{name})
            except BaseException:  # as libraries do that try what is installed
                pass
sys.meta_path.insert(0, Finder())
sys.argv = ["lowmem-db", "identifiers", "demo"]
from lowmem_db.cli.main import main
main()
"""
SIGNAL_THAT_NOHUP_IGNORES = """
import os, signal, sys
from lowmem_db.interruption import exit_on_signals
exit_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
print("alive")
"""


def python(program: str, **options: object) -> subprocess.CompletedProcess[str]:
    if hasattr(signal, "SIGHUP"):  # the tests themselves may run under nohup
        options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the handlers of this process back."""
    before, hook = {number: signal.getsignal(number) for number in stop_signals()}, sys.unraisablehook
    yield
    interruption._asked.clear()
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_while_the_command_line_is_imported(name: str) -> None:
    assert_interrupted(name, python(SIGNAL_WHILE_IMPORTING.format(module="typer", name=name)))


@pytest.mark.parametrize("module", ["lowmem_db.cli.commands", "rich", "torch", "diffusers"])
def test_signal_while_anything_else_is_imported(module: str) -> None:
    assert_interrupted("SIGINT", python(SIGNAL_WHILE_IMPORTING.format(module=module, name="SIGINT")))


def assert_interrupted(name: str, ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 130
    assert ended.stderr == f"{name}: stopped; run the same command again\n"
    assert ended.stdout == ""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_closed_terminal_is_ignored_under_nohup_alone() -> None:
    ignored = python(SIGNAL_THAT_NOHUP_IGNORES, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (ignored.returncode, ignored.stdout) == (0, "alive\n")
    assert "RunInterrupted: SIGHUP" in python(SIGNAL_THAT_NOHUP_IGNORES).stderr


def test_signals_that_a_platform_lacks_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIGHUP", "SIGUSR1"):
        monkeypatch.delattr(signal, name, raising=False)
    assert {number.name for number in stop_signals()} <= {"SIGINT", "SIGTERM", "SIGBREAK"}


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_leaves_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        assert code == 130
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    exit_on_signals()
    with pytest.raises(RunInterrupted, match="SIGTERM: stopped"):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Left):
        os.kill(os.getpid(), signal.SIGINT)
    assert "SIGINT: stopped" in capfd.readouterr().err


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_a_library_swallowed_is_not_forgotten() -> None:
    exit_on_signals()
    with pytest.raises(RunInterrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(RunInterrupted, match="SIGTERM: stopped"), handling(lambda *_: None):
        pytest.fail("went on")


@pytest.mark.usefixtures("handlers")
def test_handlers_are_put_back() -> None:
    exit_on_signals()
    before = [signal.getsignal(number) for number in stop_signals()]
    with pytest.raises(ZeroDivisionError), handling(lambda *_: None):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in stop_signals()] == before


def test_way_out_is_one_that_the_command_has(monkeypatch: pytest.MonkeyPatch, handlers: None) -> None:
    for command, has_resume in (("train", True), ("generate", False)):
        monkeypatch.setattr(sys, "argv", ["lowmem-db", command])
        exit_on_signals()
        with pytest.raises(RunInterrupted) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert ("--resume" in str(stopped.value)) == has_resume
