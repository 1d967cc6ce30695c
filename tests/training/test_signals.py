"""A signal while a model trains: what is finished, what is given up, and what that costs."""

import os
import signal
from pathlib import Path

import pytest

from lowmem_db.errors import RunInterrupted
from lowmem_db.interruption import stop_signals
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.signals import stop_on_signals


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", stop_signals())
def test_first_signal_is_a_request(run: RunFolder, number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signals(run, lambda: 3) as stop:
        assert not stop
        send(number)
        assert stop
        with pytest.raises(RunInterrupted, match=f"{number.name}: stopped after step 3; continue with --resume"):
            stop.stop()
    assert (
        f"{number.name}: saving a checkpoint after this step; a second signal stops at once" in capfd.readouterr().err
    )


def test_second_signal_stops_at_once_and_says_what_is_lost(run: RunFolder) -> None:
    def stop_twice() -> None:
        with stop_on_signals(run, lambda: 7):
            send(signal.SIGINT)
            send(signal.SIGTERM)

    with pytest.raises(RunInterrupted, match="SIGTERM: stopped at once; 8 steps since the start lost; continue with"):
        stop_twice()
    run.write_checkpoint(7, lambda folder: None)
    with pytest.raises(RunInterrupted, match="stopped at once; 1 step since the checkpoint of step 7 lost"):
        stop_twice()


def test_first_signal_among_samples_stops_after_them(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    done = []

    def draw() -> None:
        with stop_on_signals(run, lambda: 4) as stop, stop.after_checkpoint("samples"):
            send(signal.SIGINT)
            done.append("samples")

    with pytest.raises(RunInterrupted, match="SIGINT: stopped after step 4; continue with --resume"):
        draw()
    assert done == ["samples"]
    said = capfd.readouterr().err
    assert "SIGINT: the checkpoint of step 4 is saved; stopping after its samples; a second signal skips them" in said


def test_second_signal_gives_the_samples_up(run: RunFolder) -> None:
    def draw() -> None:
        with stop_on_signals(run, lambda: 4) as stop, stop.after_checkpoint("samples"):
            send(signal.SIGINT)
            send(signal.SIGINT)

    with pytest.raises(RunInterrupted, match="SIGINT: skipped the samples of step 4; --resume makes them"):
        draw()


def test_error_among_samples_is_not_hidden_by_a_signal(run: RunFolder) -> None:
    def draw() -> None:
        with stop_on_signals(run, lambda: 4) as stop, stop.after_checkpoint("samples"):
            send(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw()
