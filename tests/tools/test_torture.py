"""The counts and slopes that `make torture` reports."""

import random
from pathlib import Path

import pytest

from tools.torture.__main__ import PARTS, counts_of, kills_of
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


def test_only_kills_that_happened_count() -> None:
    noted = [
        {"variant": "a", "kind": "step", "killed": True},
        {"variant": "a", "kind": "write", "killed": True},
        {"variant": "b", "kind": "write", "killed": False},
    ]
    assert kills_of(noted) == {
        "in_all": 2, "by_kind": {"step": 1, "write": 1}, "by_variant": {"a": 2}, "not_reached": 1,
    }  # fmt: skip


def test_parts_name_files_that_exist() -> None:
    root = Path(__file__).parents[2]
    assert [name for names in PARTS.values() for name in names if not (root / name).is_file()] == []


@pytest.mark.parametrize("growth", [0.0, 0.05])
def test_growth_is_seen_and_noise_is_not(growth: float) -> None:
    noise = random.Random(0)
    rows = [{"step": step, "resident_mib": 500 + growth * step + noise.gauss(0, 2)} for step in range(2000)]
    found = slopes(rows)["resident_mib"]
    assert found["per_1000_steps"] == pytest.approx(1000 * growth, abs=1.0)
    assert (abs(found["per_1000_steps"]) > found["plus_minus"] + 5) == (growth > 0)


def test_run_that_grows_fails() -> None:
    flat = {"mean": 1.0, "per_1000_steps": 0.01, "plus_minus": 0.02}
    found = {"resident_mib": flat, "open_files": flat, "seconds": flat}
    assert growing(found, 20_000) == []
    leaking = flat | {"per_1000_steps": 10.0}
    assert growing(found | {"resident_mib": leaking, "open_files": leaking}, 20_000) == ["resident_mib", "open_files"]
