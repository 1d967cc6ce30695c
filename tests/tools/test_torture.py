"""The counts and slopes that `make torture` reports."""

import json
import random
from pathlib import Path

import pytest

from tools.torture.__main__ import PARTS, attacks_of, counts_of, is_done
from tools.torture.long_run import growing, slopes

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_x" name="test_a"/><testcase name="test_b"><failure/></testcase>
<testcase name="test_c"><skipped/></testcase>
<testcase classname="tests.integration.test_resume" name="test_d"/>
</testsuite></testsuites>"""


def test_report_is_counted(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert counts_of(tmp_path / "report.xml") == {
        "passed": 2, "skipped": 1, "failed": ["test_b"], "passed_by_file": {"test_resume": 1, "test_x": 1},
    }  # fmt: skip


def test_no_report_is_a_failure(tmp_path: Path) -> None:
    assert counts_of(tmp_path / "report.xml")["failed"]


def test_attacks_are_counted_by_place_variant_and_end() -> None:
    noted = [{"variant": "a", "place": "step"}, {"variant": "a", "place": "final"}, {"variant": "b", "place": "final"}]
    counted = {"in_all": 3, "by_place": {"final": 2, "step": 1}, "by_variant": {"a": 2, "b": 1}}
    assert attacks_of(noted) == counted
    assert attacks_of([each | {"end": "refused"} for each in noted]) == counted | {"by_end": {"refused": 3}}


@pytest.mark.parametrize(
    ("found", "done"),
    [
        ({"version": "now", "failed": []}, True), ({"version": "now", "grows": []}, True),
        ({"version": "now", "failed": ["test_a"]}, False), ({"version": "now", "grows": ["resident_mib"]}, False),
        ({"version": "before", "failed": []}, False),
    ],
)  # fmt: skip
def test_what_failed_is_repeated(
    found: dict[str, object], done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.torture.__main__.version", lambda: "now")
    (file := tmp_path / "part.json").write_text(json.dumps(found))
    assert is_done(file) is done


def test_parts_name_files_that_exist() -> None:
    root = Path(__file__).parents[2]
    assert [name for names in PARTS.values() for name in names if not (root / name).is_file()] == []


@pytest.mark.parametrize("growth", [0.0, 0.05])
def test_growth_is_seen_and_noise_is_not(growth: float) -> None:
    noise = random.Random(0)
    rows = [
        {"step": step, "resident_mib": 500 + growth * step + noise.gauss(0, 2), "processor_seconds": 0.1}
        for step in range(2000)
    ]
    found = slopes(rows)["resident_mib"]
    assert found["per_1000_steps"] == pytest.approx(1000 * growth, abs=1.0)
    assert (abs(found["per_1000_steps"]) > found["plus_minus"] + 5) == (growth > 0)


def test_run_that_grows_fails() -> None:
    flat = {"mean": 1.0, "per_1000_steps": 0.01, "plus_minus": 0.02}
    found = {"resident_mib": flat, "open_files": flat, "fastest_seconds": flat}
    assert growing(found, 20_000) == []
    leaking = flat | {"per_1000_steps": 10.0}
    assert growing(found | {"resident_mib": leaking, "open_files": leaking}, 20_000) == ["resident_mib", "open_files"]


@pytest.mark.parametrize("growth", [0.0, 1e-5])
def test_steps_that_become_slower_are_told_from_a_machine_that_does_other_things_too(growth: float) -> None:
    noise = random.Random(0)
    rows = [
        {"step": step, "processor_seconds": 0.1 + growth * step + noise.random() * (0.3 if step > 4000 else 0.0)}
        for step in range(8000)
    ]
    flat = {"per_1000_steps": 0.0, "plus_minus": 0.0}
    found = slopes(rows) | {"resident_mib": flat, "open_files": flat}
    assert growing(found, 8000) == (["fastest_seconds"] if growth else [])
