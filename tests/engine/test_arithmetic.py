"""One arithmetic for preparation, for what a plan is measured by and for training: the same bits each time on CUDA."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.distributed.world import World
from lowmem_db.engine.build import set_arithmetic
from lowmem_db.errors import ConfigError
from lowmem_db.models.finding import model_of
from lowmem_db.planning import measured
from lowmem_db.planning.cards import ASSUMED
from lowmem_db.planning.target import Target
from lowmem_db.run import run
from lowmem_db.storage.run_folder import RunFolder

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _flags_come_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling = torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filling


def test_cuda_is_strict(tiny_config: Config) -> None:
    set_arithmetic(tiny_config, CUDA)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention would stay as it is"
    assert torch.backends.cudnn.deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_cpu_stays_as_it_is(tiny_config: Config) -> None:
    set_arithmetic(tiny_config, CPU)
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_setting_of_cublas_is_refused_before_it_fails_in_a_step(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG: ':0:0'"):
        set_arithmetic(tiny_config, CUDA)


class Reached(Exception):
    pass


@pytest.mark.parametrize("phase", ["prepare", "train", "verify"])
def test_each_phase_computes_so_before_it_begins(
    phase: str, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*args: object, **kwargs: object) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise Reached

    config, model = resolve(tiny_config), model_of(tiny_config)
    monkeypatch.setattr(run, "prepare", begin)
    monkeypatch.setattr(measured, "build_step", begin)
    monkeypatch.setattr(run.environment, "resolve_device", lambda name: CUDA)
    folder, target = RunFolder(tmp_path / "run"), Target(card=ASSUMED, budget_bytes=1 << 30)
    planned = run._Planned(
        config=config, chosen=frozenset(), model=model, device=CUDA, target=target, photos=[], world=World()
    )
    phases = {
        "prepare": lambda: run.prepare_data(config),
        "train": lambda: run._prepare(folder, planned, ()),
        "verify": lambda: measured.measure_train(config, model, CUDA),
    }
    with pytest.raises(Reached):
        phases[phase]()
