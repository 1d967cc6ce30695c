"""The stages themselves, on the CPU: the contract of the JSON, and each of them broken once."""

import getpass
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

from lowmem_db.bench import bandwidth, bits, candidates, capped, kernels, killed, machine, memory, speed, steps
from lowmem_db.bench.bench import STAGES, run_bench
from lowmem_db.bench.plain_loop import PlainLoop
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.steps import Steps, first_difference
from lowmem_db.bench.strategies import TECHNIQUES, strategy
from lowmem_db.storage.run_folder import RunFolder
from tests.cli.conftest import REPOSITORY

NAMES = ["environment", "kernels", "bits", "memory", "speed", "candidates", "bandwidth", "capped"]
SETTING = Setting(torch.device("cpu"), tiny=True)
USER, HOME = "wilhelmina-user", "/home/wilhelmina-user"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the command once, without network, with time that decides nothing."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "lowmem_db", "bench", "--device", "cpu", "--tiny", "--share", "--minutes", "80"]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [*command, "--output", str(folder / "bench.json")],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "USER": USER},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, folder


def test_command_measures_every_stage(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = finished
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "bench.json").read_text())
    assert {"card", "versions", "stages"} <= found.keys()
    assert [stage["name"] for stage in found["stages"]] == NAMES
    assert all(stage["ok"] is True and stage["seconds"] >= 0.0 for stage in found["stages"])
    assert found["versions"]["torch"] == torch.__version__
    assert all(row["same_bits"] is True for row in found["stages"][2]["strategies"])


def test_prediction_of_each_strategy_stands_beside_what_it_needed(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    strategies = json.loads((finished[1] / "bench.json").read_text())["stages"][3]["strategies"]
    assert len(strategies) == 3
    for row in strategies:
        assert row["predicted_bytes"] == pytest.approx(row["allocated_bytes"], rel=0.02)
        assert row["reserved_bytes"] is None


def test_command_prints_a_table_and_what_can_be_shared(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = finished
    assert "| stage | what | ok | found |" in done.stdout
    (file,) = folder.glob("*-shared.json")
    text = file.read_text()
    assert text in done.stdout
    assert not any(each in text for each in (str(folder), str(Path.home()), USER, f'"{socket.gethostname()}', "/tmp"))
    assert getpass.getuser() not in json.loads(text)["card"].values()
    assert {"card", "versions", "stages"} <= json.loads(text).keys()


def broken(*args: object, **kwargs: object) -> Any:
    raise RuntimeError("broken on purpose")


BREAKS = {
    "environment": (machine.environment, "back_ends"),
    "kernels": (kernels.lowmem_db_kernels, "status"),
    "bits": (bits, "strategy"),
    "memory": (memory, "trace_train"),
    "speed": (speed, "PlainLoop"),
    "candidates": (candidates, "seconds_in_turn"),
    "bandwidth": (bandwidth, "_rate"),
    "capped": (capped, "Planner"),
}


@pytest.mark.parametrize("name", NAMES)
def test_stage_that_breaks_fails_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured by name alone here, the broken one is the real one."""
    monkeypatch.setattr(*BREAKS[name], broken)
    nothing = [("nothing", dict)]
    stages = [each if each.name == name else replace(each, measurements=lambda setting: nothing) for each in STAGES]
    found = run_bench(SETTING, tmp_path / "bench.json", stages=stages, minutes=80.0)["stages"]
    assert [stage["name"] for stage in found] == NAMES
    assert [stage["name"] for stage in found if not stage["ok"]] == [name]
    assert "broken on purpose" in next(stage["error"] for stage in found if stage["name"] == name)


def test_state_that_is_not_restored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, "restore", lambda self, state: None)
    with pytest.raises(ValueError, match="is not what was saved"):
        bits._repeated(SETTING, "in_backward")


@dataclass
class Event:
    """What torch's profiler tells of an event, as far as it is read."""

    name: str
    time_range: Interval
    device_type: DeviceType = DeviceType.CUDA
    is_user_annotation: bool = False


def test_kernels_side_by_side_count_once_and_copies_not_at_all() -> None:
    events = [
        Event("gemm", Interval(0, 10)),
        Event("norm", Interval(5, 12)),
        Event("inside", Interval(6, 8)),
        Event("later", Interval(20, 21)),
        Event("Memcpy HtoD (Pinned -> Device)", Interval(0, 100)),
        Event("Memcpy DtoD (Device -> Device)", Interval(30, 31)),
        Event("Optimizer.step", Interval(0, 100), is_user_annotation=True),
        Event("aten::mm", Interval(0, 100), DeviceType.CPU),
    ]
    assert speed.covered(speed._computing(events)) == 12 + 1 + 1
    assert speed.covered([]) == 0


@pytest.mark.parametrize(
    ("variable", "after"),
    [
        ("expandable_segments:True", "expandable_segments:True"),
        ("max_split_size_mb:64", "max_split_size_mb:64,expandable_segments:False"),
        ("expandable_segments:False,max_split_size_mb:64", "expandable_segments:False,max_split_size_mb:64"),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_allocator_has_its_settings_back(
    monkeypatch: pytest.MonkeyPatch, variable: str, after: str, *, fails: bool
) -> None:
    told: list[str] = []

    def steps(setting: Setting, settings: str) -> tuple[float, int]:
        candidates._set_allocator(settings)
        if fails:
            raise RuntimeError("out of memory")
        return 1.0, 1

    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", variable)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    monkeypatch.setattr(candidates, "_with_allocator", steps)
    with pytest.raises(RuntimeError) if fails else nullcontext():
        candidates._expandable_segments(SETTING)
    assert told[0] == "expandable_segments:False"
    assert told[-1] == after


@pytest.mark.parametrize("fails", [False, True])
def test_plain_loop_computes_as_torch_does_and_ours_is_strict_afterwards(
    monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    def step(self: PlainLoop) -> None:
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.deterministic
        if fails:
            raise RuntimeError("broken on purpose")

    monkeypatch.setattr(PlainLoop, "_step", step)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) if fails else nullcontext():
            PlainLoop.__new__(PlainLoop)()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def saved_here(process: object, setting: Setting, technique: str, run: RunFolder) -> None:
    """Save the checkpoints in this process, which is quicker than to kill another."""
    del process
    step = Steps(strategy(setting, technique, TECHNIQUES[technique]), setting.device)
    for _ in range(2):
        step()
        step.save(run)


@pytest.mark.parametrize(
    "technique",
    [name if name == "streamed_weights" else pytest.param(name, marks=pytest.mark.long) for name in TECHNIQUES],
)
def test_each_technique_goes_on_from_its_checkpoint(technique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "kill_in_its_steps", saved_here)
    whole = [name for name, _ in bits.STAGE.measurements(replace(SETTING, tiny=False))]
    assert f"{technique}, killed" in whole
    assert bits._resumed(SETTING, technique, lambda: broken)["same_bits"]


def test_checkpoint_of_a_killed_process_that_is_not_restored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "kill_in_its_steps", saved_here)
    monkeypatch.setattr(steps, "restore_checkpoint", lambda run, step, objects: "")
    with pytest.raises(ValueError, match="differs after a kill behind step 2"):
        bits._resumed(SETTING, "in_backward", lambda: broken)


@pytest.mark.slow
def test_a_process_is_killed_under_each_technique() -> None:
    stage = bits.STAGE.measurements(replace(SETTING, tiny=False))
    killed_ones = {name: measure()["same_bits"] for name, measure in stage if name.endswith(", killed")}
    assert killed_ones == {f"{name}, killed": True for name in TECHNIQUES}


def test_processes_are_started_ahead_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        begun.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=pipe, stderr=pipe, text=True))
        return begun[-1]

    monkeypatch.setattr(killed, "_start", start)
    with killed.started_ahead(4) as take:
        assert take() is begun[0]
        assert len(begun) == 3, "two more are on their way"
        taken = [take(), take(), take()]
        assert taken == begun[1:], "no more than were asked for"
        with pytest.raises(RuntimeError, match="ended by itself with exit code 0, and said: nothing"):
            killed.kill_in_its_steps(taken[0], SETTING, "in_backward", RunFolder(Path("nowhere")))
        for process in (begun[0], *taken):
            killed._end(process)
    with killed.started_ahead(4) as take:
        killed._end(take())
    assert all(process.poll() is not None for process in begun)


def test_process_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", "input(); input()"], stdin=pipe, stderr=pipe, text=True)
    monkeypatch.setattr(killed, "_LONGEST_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="saved nothing in 0 s, and said: nothing"):
        killed.kill_in_its_steps(process, SETTING, "in_backward", RunFolder(tmp_path))
    assert process.poll() is not None


@pytest.mark.long
def test_process_that_ends_by_itself_is_no_killed_one(tmp_path: Path) -> None:
    with (
        killed.started_ahead(1) as take,
        pytest.raises(RuntimeError, match=r"ended by itself with exit code 1, and said: KeyError: 'no such technique'"),
    ):
        killed.kill_in_its_steps(take(), SETTING, "no such technique", RunFolder(tmp_path))


def test_first_difference_is_named_by_its_place() -> None:
    state = {"unet": {"a": torch.zeros(2), "b": torch.zeros(2)}, "number": 1}
    other = {"unet": {"a": torch.zeros(2), "b": torch.tensor([0.0, 1.0])}, "number": 1}
    assert first_difference(state, state) is None
    assert first_difference(state, other) == "unet.b"


def test_kernel_whose_self_test_failed_fails_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    status = kernels.lowmem_db_kernels.OperatorStatus("geglu", "eager", "its self-test failed on cuda: wrong")
    monkeypatch.setattr(kernels.lowmem_db_kernels, "status", lambda device: [status])
    with pytest.raises(AssertionError, match="self-test failed"):
        partial(kernels._tested, "geglu")(SETTING)


def test_strategy_that_does_not_fit_is_predicted_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.environment, "free_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(memory, "measure_train", broken)
    ((_, measure),) = [each for each in memory.STAGE.measurements(SETTING) if each[0] == "streamed"]
    row = measure()
    assert row["predicted_process_bytes"] > row["predicted_bytes"] > 1 << 20
    assert row["allocated_bytes"] is None
    assert "more memory than is free" in row["skipped"]
