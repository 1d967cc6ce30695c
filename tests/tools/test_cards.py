"""Reports of cards: tables for the docs, figures for the planner; none has been measured yet."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem_db.planning import calibration
from lowmem_db.planning.cards import find_card, seconds_per_step
from tests.planning.test_cards import costs_of
from tools.cards.calibrate import Calibration, calibrated, render_module
from tools.cards.reports import read_reports
from tools.cards.tables import page, summary, with_block

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def stage(name: str, rows: str, *found: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ok": True, "seconds": 1.0, rows: list(found)}


def report(card: str, **changes: Any) -> dict[str, Any]:
    memory = {"predicted_bytes": 2000 * MIB, "allocated_bytes": 2040 * MIB, "reserved_bytes": 2100 * MIB}
    return {
        "card": {"name": card, "memory_bytes": 12 << 30, "capability": "8.6", "driver": "580.1"},
        "versions": {"torch": "2.13.0"},
        "tiny": False,
        "quick": False,
        "stages": [
            stage("environment", "measurements", {"name": "context", "context_bytes": 300 * MIB + 1}),
            stage(
                "memory",
                "strategies",
                {"name": "streamed", "process_bytes": 2500 * MIB} | memory,
                {"name": "nested", "error": "OutOfMemoryError"},
                {"name": "fp32", "predicted_bytes": 1, "allocated_bytes": None, "reserved_bytes": None},
            ),
            stage(
                "speed",
                "comparisons",
                {
                    "name": "adamw",
                    "predicted_seconds_per_step": 0.4,
                    "seconds_per_step": 0.5,
                    "plain_seconds_per_step": 0.6,
                    "ratio": 0.5 / 0.6,
                },
            ),
            stage(
                "candidates",
                "candidates",
                {"name": "channels_last", "seconds_per_step": 0.43, "base_seconds_per_step": 0.5, "ratio": 0.86},
                {"name": "compile", "seconds_per_step": 0.4, "base_seconds_per_step": 0.5, "ratio": 0.8},
                {"name": "fused_layers", "ratio": None, "skipped": "no kernels"},
            ),
            stage(
                "bandwidth",
                "measurements",
                {"name": "copy", "gb_per_second": 324.0},
                {"name": "host_to_device", "gb_per_second": 0.985 * 2 * 16 * 0.7},
            ),
        ],
        "dropped": ["capped"],
    } | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(report("NVIDIA GeForce RTX 3060")))
    return tmp_path


def test_nothing_measured_leaves_the_estimates() -> None:
    assert calibrated([]) == Calibration()
    assert "predicted" in summary([])
    assert "predicted" in page([])


def test_figures_are_those_that_were_measured(folder: Path) -> None:
    found = calibrated(read_reports(folder))
    assert found == Calibration(
        num_cards=1,
        cuda_context=301 * MIB,
        cuda_workspaces=40 * MIB,
        fragmentation=0.03,
        share_of_bandwidth=0.9,
        share_of_pcie=0.7,
        ratios={"RTX 3060": {"memory.channels_last": 0.86}},
        seconds={"RTX 3060": 1.25},
    )


def test_the_worst_card_sets_the_allowance_and_the_median_the_rate(folder: Path) -> None:
    for name, rate in (("b", 288.0), ("c", 180.0)):
        other = report("NVIDIA GeForce RTX 3060")
        other["stages"][4]["measurements"][0]["gb_per_second"] = rate
        other["stages"][0]["measurements"][0]["context_bytes"] = int(rate) * MIB
        (folder / f"{name}.json").write_text(json.dumps(other))
    found = calibrated(read_reports(folder))
    assert (found.num_cards, found.cuda_context, found.share_of_bandwidth) == (3, 301 * MIB, 0.8)


def test_stages_that_failed_or_were_left_out_keep_the_estimates() -> None:
    found = calibrated([report("NVIDIA GeForce RTX 3060", stages=[])])
    assert found == Calibration(num_cards=1)


def test_module_holds_the_figures(folder: Path) -> None:
    found, module = calibrated(read_reports(folder)), {}
    exec(render_module(found), module)
    assert module["CUDA_CONTEXT"] == 301 * MIB
    assert module["SECONDS"] == {"RTX 3060": 1.25}
    assert module["RATIOS"] == {"RTX 3060": {"memory.channels_last": 0.86}}
    assert "Measured on one card." in module["__doc__"]


def test_planner_takes_the_seconds_of_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card, costs = find_card("rtx 3060 8gb"), costs_of(1000)
    before = seconds_per_step(costs, card)
    monkeypatch.setattr(calibration, "SECONDS", {"RTX 3060": 1.25})
    assert seconds_per_step(costs, card) == pytest.approx(1.25 * before)
    assert seconds_per_step(costs, find_card("rtx 4090")) == pytest.approx(before)


def test_tables_show_prediction_beside_measurement(folder: Path) -> None:
    reports = read_reports(folder)
    text = page(reports)
    assert "| streamed | 1.95 GiB | 1.99 GiB | 2.05 GiB | 2.44 GiB |" in text
    assert "| adamw | 0.400 s | 0.500 s | 0.600 s | 0.83 |" in text
    assert "| channels_last | 0.430 s | 0.500 s | 0.86 |" in text
    assert "fused_layers" not in text
    assert "left out: capped" in text
    assert "nested" not in text
    assert "| NVIDIA GeForce RTX 3060 | 1.95 GiB / 1.99 GiB | 0.500 s / 0.600 s |" in summary(reports)


@pytest.mark.parametrize("broken", [{"tiny": True}, {"card": {"name": "x86_64", "capability": None}}, {"card": None}])
def test_what_is_no_report_of_a_card_is_refused_by_name(tmp_path: Path, broken: dict[str, Any]) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(report("x") | broken))
    with pytest.raises(ValueError, match=r"cpu\.json: is not a report"):
        read_reports(tmp_path)


def test_everything_generated_is_up_to_date() -> None:
    reports = read_reports(ROOT / "benchmarks" / "results" / "cards")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_block(readme, summary(reports)) == readme
    assert (ROOT / "docs" / "cards.md").read_text(encoding="utf-8") == page(reports)
    module = ROOT / "lowmem_db" / "planning" / "calibration.py"
    assert module.read_text(encoding="utf-8") == render_module(calibrated(reports))
