"""How stages run: failures, limits, minutes, and what stands in the file at any moment."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowmem_db import environment
from lowmem_db.bench.bench import run_bench
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Clock, Measurement, Stage

SETTING = Setting(torch.device("cpu"), tiny=True)


class FakeClock:
    """Seconds that pass where a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def clock(self) -> Clock:
        return Clock(lambda: self.seconds)

    def takes(self, seconds: float, **row: object) -> Measurement:
        def measure() -> dict[str, object]:
            self.seconds += seconds
            return row

        return f"of {seconds:g} s", measure


def stage(name: str, *measurements: Measurement, limit: float = 60.0) -> Stage:
    return Stage(name=name, rows="rows", limit_seconds=limit, measurements=lambda setting: measurements)


def fails() -> dict[str, object]:
    raise RuntimeError("it\nbroke")


def test_measurement_that_fails_says_why_and_takes_no_other_along(tmp_path: Path) -> None:
    stages = [stage("first", ("bad", fails), ("good", lambda: {"bytes": 3})), stage("second", ("good", dict))]
    first, second = run_bench(SETTING, tmp_path / "bench.json", stages=stages)["stages"]
    assert first["rows"] == [{"name": "bad", "error": "RuntimeError: it broke"}, {"name": "good", "bytes": 3}]
    assert (first["ok"], first["error"]) == (False, "bad: RuntimeError: it broke")
    assert second["ok"]


def test_stage_that_cannot_begin_says_why_and_takes_no_other_along(tmp_path: Path) -> None:
    def broken(setting: Setting) -> Iterator[Measurement]:
        raise KeyError("nothing")
        yield

    first = Stage(name="first", rows="rows", limit_seconds=1.0, measurements=broken)
    found = run_bench(SETTING, tmp_path / "bench.json", stages=[first, stage("second", ("good", dict))])
    assert [each["ok"] for each in found["stages"]] == [False, True]
    assert found["stages"][0]["error"] == "KeyError: 'nothing'"


def test_fault_of_the_card_that_every_call_tells_again_ends_no_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def release(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(environment, "release_memory", release)
    stages = [stage("first", ("good", dict)), stage("second", ("bad", fails)), stage("third", ("good", dict))]
    first, second, third = run_bench(SETTING, tmp_path / "bench.json", stages=stages)["stages"]
    told = "release of memory: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [each["ok"] for each in (first, second, third)] == [False, False, False]
    assert (first["error"], second["error"], third["error"]) == (told, "bad: RuntimeError: it broke", told)
    assert third["rows"] == [{"name": "good"}]


def test_card_that_does_not_answer_any_more_is_asked_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def synchronize(self: Setting) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Setting, "synchronize", synchronize)
    stages = [stage("first", ("good", dict)), stage("second", ("bad", fails)), stage("third", ("bad", fails))]
    first, second, third = run_bench(SETTING, tmp_path / "bench.json", stages=stages)["stages"]
    assert (first["ok"], second["error"]) == (True, "bad: RuntimeError: it broke")
    assert third["error"].startswith("skipped: the card does not answer since second (RuntimeError: CUDA error")
    assert (third["ok"], third["rows"]) == (False, [])
    assert capsys.readouterr().err.count("it broke") == 1


def test_what_is_measured_stands_in_the_file_at_once(tmp_path: Path) -> None:
    file, seen = tmp_path / "bench.json", []

    def look() -> dict[str, object]:
        seen.append(json.loads(file.read_text()))
        return {}

    found = run_bench(
        SETTING, file, stages=[stage("first", ("good", dict), ("look", look)), stage("second", ("x", look))]
    )
    assert seen[0]["stages"][0]["rows"] == [{"name": "good"}]
    assert [each["name"] for each in seen[1]["stages"]][:1] == ["first"]
    assert json.loads(file.read_text()) == found


def test_measurements_behind_the_limit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeClock()
    measurements = [fake.takes(40.0), fake.takes(30.0), fake.takes(1.0)]
    found = run_bench(
        SETTING, tmp_path / "bench.json", stages=[stage("slow", *measurements)], clock=fake.clock(), minutes=2.0
    )["stages"][0]
    assert [row["name"] for row in found["rows"]] == ["of 40 s", "of 30 s"]
    assert (found["left_out"], found["ok"], found["seconds"]) == (["of 1 s"], True, 70.0)
    assert "slow: no time for of 1 s; give more --minutes" in capsys.readouterr().err


@pytest.mark.parametrize(("minutes", "dropped"), [(1.0, ["c"]), (0.6, ["b", "c"]), (8.0, []), (0.1, ["a", "b", "c"])])
def test_minutes_drop_stages_from_the_end_and_name_them(
    tmp_path: Path, minutes: float, dropped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeClock()
    stages = [stage(name, fake.takes(20.0), limit=25.0) for name in "abc"]
    found = run_bench(SETTING, tmp_path / "bench.json", stages=stages, clock=fake.clock(), minutes=minutes)
    assert found["dropped"] == dropped
    assert [each["name"] for each in found["stages"]] == [name for name in "abc" if name not in dropped]
    assert (", ".join(dropped) in capsys.readouterr().err) or not dropped


def test_more_minutes_give_stages_more_time(tmp_path: Path) -> None:
    fake = FakeClock()
    slow = stage("slow", fake.takes(100.0), fake.takes(1.0))
    found = run_bench(SETTING, tmp_path / "bench.json", stages=[slow], clock=fake.clock(), minutes=16.0)
    assert "left_out" not in found["stages"][0]
