"""The rows that were measured: JSON lines, one for each variant, subject and seed."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RUNS_FILE = "runs.jsonl"


def read_rows(folder: Path) -> list[Row]:
    """Return all rows of a result folder; none where there is no file."""
    path = folder / RUNS_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append_row(folder: Path, row: Row) -> None:
    """Add a row."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RUNS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def find_row(rows: Iterable[Row], *, variant: str, subject: str, seed: int) -> Row | None:
    """Return the row of a run, or None."""
    wanted = {"variant": variant, "subject": subject, "seed": seed}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def values_of(rows: Sequence[Row], variant: str, metric: str, subjects: Sequence[str]) -> dict[tuple[str, int], float]:
    """Return a metric of a variant by subject and seed, where it was measured."""
    return {
        (row["subject"], row["seed"]): row[metric]
        for row in rows
        if row["variant"] == variant and row["subject"] in subjects and metric in row
    }
