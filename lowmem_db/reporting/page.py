"""The page: one file without network, whose content-security policy allows nothing but its own style and script."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_db.reporting.charts import Curve, line_chart, smoothed
from lowmem_db.reporting.records import RunRecord, read_run
from lowmem_db.reporting.rendering import fill
from lowmem_db.reporting.view import facts_of, points_of, samples_of, settings_of, view_of
from lowmem_db.storage.atomic import write_text

REPORT_FILE = "report.html"
SHARED_FILE = "report_to_share.html"


def write_report(folders: Sequence[Path], output: Path, *, share: bool = False) -> None:
    """Write the page about one run, or about several beside each other.

    Args:
        folders: Run folders.
        output: The HTML file.
        share: Leave out what is private: photos, paths and the names of folders.

    Raises:
        CheckpointError: A folder is not a run.
        StorageError: The disk is full.
    """
    write_text(output, render([read_run(folder) for folder in folders], share=share))


def render(runs: Sequence[RunRecord], *, share: bool = False) -> str:
    """Return the HTML of the page."""
    names = [f"run {number}" for number in range(1, len(runs) + 1)] if share else _names(runs)
    return fill(
        "page.html",
        runs=[view_of(run, name, share=share) for run, name in zip(runs, names, strict=True)],
        comparison=_comparison(runs, names, share=share) if len(runs) > 1 else None,
    )


def _comparison(runs: Sequence[RunRecord], names: Sequence[str], *, share: bool) -> dict[str, Any]:
    settings = [dict(settings_of(run.config, share=share)) for run in runs]
    keys = sorted({key for values in settings for key in values} - {"output_dir"})
    curves = [
        Curve(name, smoothed(points_of(run.rows, "loss_instance")), colour=number)
        for number, (run, name) in enumerate(zip(runs, names, strict=True), start=1)
    ]
    scores = [
        Curve(name, points_of(run.scores, "score"), colour=number)
        for number, (run, name) in enumerate(zip(runs, names, strict=True), start=1)
    ]
    facts = [dict(facts_of(run)) for run in runs]
    fact_names = dict.fromkeys(name for of_run in facts for name in of_run)
    return {
        "names": names,
        "charts": [c for c in (line_chart("Instance loss, smoothed", curves), line_chart("Score", scores)) if c],
        "facts": [(name, [of_run.get(name, "") for of_run in facts]) for name in fact_names],
        "differences": [
            (key, [values.get(key, "") for values in settings])
            for key in keys
            if len({values.get(key) for values in settings}) > 1
        ],
        "last_samples": [samples_of(run)[-1:] for run in runs],
    }


def _names(runs: Sequence[RunRecord]) -> list[str]:
    short = [run.name for run in runs]
    return short if len({*short}) == len(short) else [str(run.run.root.absolute()) for run in runs]
