"""Scores of the steps of a run: which one was best, and whether it is time to stop.

Both follow from ``scores.jsonl`` alone, so a resumed run decides like an uninterrupted one.
"""

from collections.abc import Mapping
from typing import Any

from lowmem_db.console import say
from lowmem_db.storage.run_folder import RunFolder, append_row, read_rows


class Scores:
    """The scores so far.

    Args:
        run: The run folder.
        patience: Stop after so many scores in a row without a new best. None: never stop.
    """

    def __init__(self, run: RunFolder, patience: int | None) -> None:
        self._file = run.scores_file
        self._patience = patience

    def has(self, step: int) -> bool:
        """Return whether a step has a score."""
        return any(row["step"] == step for row in self._rows())

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the scores of a step: ``score``, higher is better, and the metrics behind it.

        Raises:
            StorageError: The disk is full.
        """
        append_row(self._file, {"step": step, **metrics})
        best = "" if self.best_step() == step else f", the best is {self.best_step()}"
        say(f"scores of step {step}: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}{best}")

    def best_step(self) -> int | None:
        """Return the step with the highest score, the first one among equals; None if there is no score yet."""
        rows = self._rows()
        return max(rows, key=lambda row: row["score"])["step"] if rows else None

    def out_of_patience(self) -> bool:
        """Return whether the last ``patience`` scores brought no new best."""
        if self._patience is None or (best := self.best_step()) is None:
            return False
        return sum(row["step"] > best for row in self._rows()) >= self._patience

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in read_rows(self._file) if isinstance(row.get("score"), int | float)]
