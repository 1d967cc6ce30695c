"""Commands in processes of their own: how they end is known to whoever looks, whatever became of who started them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem_db.errors import LowmemDbError
from lowmem_db.ui import jobs
from lowmem_db.ui.jobs import Job, job_in, output_of, start, stop
from tests.cli.conftest import environment_of_commands  # noqa: F401


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch, environment_of_commands: dict[str, str]) -> None:  # noqa: F811
    for name in ("PYTHONPATH", "LOWMEM_DB_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, environment_of_commands[name])


def ended(folder: Path) -> Job:
    while (job := job_in(folder)).is_running:
        time.sleep(0.05)
    for process in jobs._processes:
        process.wait()
    return job


def test_there_is_nothing_before_the_first_job(tmp_path: Path) -> None:
    assert job_in(tmp_path) == Job("none")


def test_commands_run_one_after_the_other_and_their_output_is_kept(tmp_path: Path) -> None:
    start(tmp_path / "job", [["--version"], ["configs"]])
    assert job_in(tmp_path / "job").is_running
    with pytest.raises(LowmemDbError, match="runs already"):
        start(tmp_path / "job", [["--version"]])
    assert ended(tmp_path / "job").state == "done"
    assert (tmp_path / "job/output-0.txt").read_text().startswith("lowmem-db ")
    assert "demo" in (tmp_path / "job/output-1.txt").read_text()
    assert output_of(tmp_path / "job") is None  # no JSON


def test_error_is_told_and_ends_the_job(tmp_path: Path) -> None:
    start(tmp_path / "job", [["report", "no<b>where"], ["--version"]])
    job = ended(tmp_path / "job")
    assert (job.state, job.message) == ("failed", "RUN: no<b>where is not a folder; give the output_dir of a run")
    assert not (tmp_path / "job/output-1.txt").exists()


def test_job_goes_on_without_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from lowmem_db.ui.jobs import start\n"
        "start(Path(sys.argv[1]), [['configs']]); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "job")]).returncode == 9
    assert ended(tmp_path / "job").state == "done"


def test_killed_job_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "commands.json").write_text(json.dumps([["--version"]]))
    (tmp_path / ".lock").touch()
    (tmp_path / "started").touch()
    assert job_in(tmp_path) == Job("failed", "it was killed")


def test_job_that_has_not_taken_its_lock_yet_is_not_called_killed(tmp_path: Path) -> None:
    (tmp_path / "commands.json").write_text(json.dumps([["--version"]]))
    (tmp_path / ".lock").touch()
    assert job_in(tmp_path).is_running


def test_job_that_ends_while_one_looks_is_not_called_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end_now(lock: Path) -> bool:
        (tmp_path / "ended.json").write_text(json.dumps({"code": 0}))
        return False

    (tmp_path / "commands.json").write_text(json.dumps([["--version"]]))
    (tmp_path / "started").touch()
    monkeypatch.setattr(jobs, "_is_locked", end_now)
    assert job_in(tmp_path).state == "done"


def test_job_is_stopped(tmp_path: Path) -> None:
    start(tmp_path / "job", [["plan", "sd15"]])
    stop(tmp_path / "job")
    assert ended(tmp_path / "job").state == "stopped"
