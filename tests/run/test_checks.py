"""What a machine is checked for before a run, and what is said meanwhile."""

from pathlib import Path

import pytest
import torch

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.errors import StorageError
from lowmem_db.run.checks import check_folders, check_machine
from lowmem_db.run.run import prepare_data


@pytest.mark.parametrize("compiles", [False, True])
def test_compilation_is_announced_before_it_begins(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, compiles: bool
) -> None:
    def check_kernels(device: torch.device) -> None:
        assert ("compiling kernels, once for cpu" in capsys.readouterr().err) is compiles

    monkeypatch.setattr(environment, "will_compile", lambda device: compiles)
    monkeypatch.setattr(environment, "check_kernels", check_kernels)
    check_machine(resolve(tiny_config), torch.device("cpu"))


@pytest.mark.parametrize("place", ["file", "file/cache"])
def test_cache_that_cannot_be_made_is_refused(tiny_config: Config, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    config = tiny_config.model_copy(update={"cache_dir": tmp_path / place})
    for check in (check_folders, prepare_data):
        with pytest.raises(StorageError, match=r"^cache_dir: .*file is in its place"):
            check(config)
