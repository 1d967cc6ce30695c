"""Commands as a user gives them: in this process where that is enough, else in one of their own."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowmem_db.cli.main import main
from lowmem_db.config.loading import load_config, write_yaml
from lowmem_db.interruption import stop_signals
from lowmem_db.run.run import train
from tests.conftest import fields_in

REPOSITORY = Path(__file__).parents[2]
_SHORT = {"prior.enabled": False, "training.max_train_steps": 2}


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Run a command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    hook = sys.unraisablehook
    logger = logging.getLogger("lowmem_db")
    log_handlers = list(logger.handlers)

    def run_command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lowmem-db", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Outcome(code=int(ended.value.code or 0), out=out, err=err)

    yield run_command
    logger.handlers[:] = log_handlers
    sys.unraisablehook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def environment_of_commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {"PYTHONPATH": path, "LOWMEM_DB_CACHE": cache, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}


@pytest.fixture
def start(environment_of_commands: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Start a command in a process of its own."""

    def start_command(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "lowmem_db", *map(str, arguments)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment_of_commands,
            cwd=tmp_path,
        )

    return start_command


@pytest.fixture
def config_file(tiny_fields: dict[str, object], tmp_path: Path) -> Path:
    write_yaml(load_config(None, list((tiny_fields | _SHORT).items())), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


@pytest.fixture(scope="session")
def _trained_once(tiny_model: Path, photos_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(load_config(None, list((fields_in(folder, tiny_model, photos_dir) | _SHORT).items())))
    return folder / "run"


@pytest.fixture
def trained(_trained_once: Path, tmp_path: Path) -> Path:
    """Return the run folder that ``train`` with ``config_file`` leaves."""
    return Path(shutil.copytree(_trained_once, tmp_path / "run"))
