"""The page about a run, rewritten while it trains."""

from collections.abc import Mapping
from pathlib import Path

from lowmem_db.console import warn
from lowmem_db.errors import StorageError
from lowmem_db.reporting.page import REPORT_FILE, write_report
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.observers import Observer


class ReportPage(Observer):
    """Rewrites ``report.html`` at each checkpoint, with new samples and scores, and at the end.

    Args:
        run: The run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def checkpoint(self, step: int) -> None:
        """Rewrite the page."""
        write_page(self._run)

    def samples(self, step: int, folder: Path) -> None:
        """Rewrite the page."""
        write_page(self._run)

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rewrite the page."""
        write_page(self._run)

    def end(self) -> None:
        """Rewrite the page."""
        write_page(self._run)


def write_page(run: RunFolder) -> None:
    """Write ``report.html``; a disk that has no room for it does not end the run."""
    try:
        write_report([run.root], run.root / REPORT_FILE)
    except StorageError as error:
        warn(f"report.html was not written ({error}); write it later: lowmem-db report {run.root}")
