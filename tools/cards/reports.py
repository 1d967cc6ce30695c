"""Reading the reports of ``lowmem-db bench``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]
Row = Mapping[str, Any]


def read_reports(folder: Path) -> list[Report]:
    """Return the reports of cards in a folder, in the order of their file names.

    Raises:
        ValueError: A file is not a report of a card.
    """
    return [_read(file) for file in sorted(folder.glob("*.json"))]


def _read(file: Path) -> Report:
    report = json.loads(file.read_text(encoding="utf-8"))
    card = report.get("card") if isinstance(report, dict) else None
    if not isinstance(card, dict) or not card.get("capability") or report.get("tiny") is not False:
        raise ValueError(f"{file}: is not a report of `lowmem-db bench` on a card, without --tiny")
    return report


def rows(report: Report, stage: str) -> Iterator[Row]:
    """Yield the measurements of a stage that did not fail; none if the stage was left out."""
    for found in report["stages"]:
        if found["name"] == stage:
            measured = next(value for value in found.values() if isinstance(value, list))
            yield from (row for row in measured if "error" not in row)


def row(report: Report, stage: str, name: str) -> Row:
    """Return one measurement, or an empty one if it failed or was left out."""
    return next((each for each in rows(report, stage) if each["name"] == name), {})
