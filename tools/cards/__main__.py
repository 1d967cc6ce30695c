"""``python -m tools.cards`` renews ``docs/cards.md``, the README's lines and ``lowmem_db/planning/calibration.py``."""

from pathlib import Path

from tools.cards.calibrate import calibrated, render_module
from tools.cards.reports import read_reports
from tools.cards.tables import page, summary, with_block

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Renew everything that is made from the reports."""
    reports = read_reports(ROOT / "benchmarks" / "results" / "cards")
    (ROOT / "docs" / "cards.md").write_text(page(reports), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_block(readme.read_text(encoding="utf-8"), summary(reports)), encoding="utf-8")
    module = ROOT / "lowmem_db" / "planning" / "calibration.py"
    module.write_text(render_module(calibrated(reports)), encoding="utf-8")


if __name__ == "__main__":
    main()
