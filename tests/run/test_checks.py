"""What a machine is checked for before a run, and what is said meanwhile."""

import pytest
import torch

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.run.checks import check_machine


@pytest.mark.parametrize("compiles", [False, True])
def test_compilation_is_announced_before_it_begins(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, compiles: bool
) -> None:
    def check_kernels(device: torch.device) -> None:
        assert ("compiling kernels, once for cpu" in capsys.readouterr().err) is compiles

    monkeypatch.setattr(environment, "will_compile", lambda device: compiles)
    monkeypatch.setattr(environment, "check_kernels", check_kernels)
    check_machine(resolve(tiny_config), torch.device("cpu"))
