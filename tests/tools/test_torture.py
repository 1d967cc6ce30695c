"""The counts and slopes that `make torture` reports."""

import random
from pathlib import Path

import pytest

from tools.torture.__main__ import PARTS, counts_of
from tools.torture.long_run import slopes

REPORT = """<testsuites><testsuite>
<testcase name="test_a"/><testcase name="test_b"><failure/></testcase><testcase name="test_c"><skipped/></testcase>
<testcase name="test_killed_runs_end_bit_for_bit_as_uninterrupted_ones[adamw]"/>
</testsuite></testsuites>"""


def test_report_is_counted(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert counts_of(tmp_path / "report.xml") == {"passed": 2, "skipped": 1, "failed": ["test_b"], "variants": 1}


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
