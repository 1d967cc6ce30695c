"""Writes ``docs/quality.md`` from the committed rows and the hand-written notes alone.

    python -m benchmarks.quality.write_quality [--pictures runs/quality/pictures]

With ``--pictures`` the contact sheets are made anew from the pictures of the runs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.quality.contact_sheet import save_sheet, thumbnails
from benchmarks.quality.lists import ABLATIONS, VARIANTS
from benchmarks.quality.results import Row, read_rows, values_of
from benchmarks.quality.statistics import direction, mean_of, paired_difference, sentence
from benchmarks.quality.subjects import BY_NAME
from benchmarks.quality.variants import Ablation, runs_of
from lowmem_db.evaluation.metrics import Score

RESULTS = Path("benchmarks/results/quality")
CONTROL = "nearly_the_reference"
FEW = 5
"""With fewer subjects an interval is hardly more than the spread between them, and no direction is called shown."""
WORDS = {1: "higher", -1: "lower", 0: "no difference shown", None: "not measured"}
CEILING = "metric_ceiling.json"
NOTES = Path(__file__).parent / "notes.md"
PAGE = Path("docs/quality.md")
SHEET_SUBJECTS = ("drawn_dog", "dog3")
INTRODUCTION = Path(__file__).parent / "introduction.md"


def page(
    rows: Sequence[Row],
    notes: str,
    *,
    ceiling: Mapping[str, Mapping[str, float]] | None = None,
    sheets: Path | None = None,
) -> str:
    """Return the page.

    Args:
        rows: The rows.
        notes: What was found out by hand, in Markdown.
        ceiling: What `metric_ceiling` found, by subject.
        sheets: Folder of the contact sheets, or None for a page without pictures.
    """
    if not rows:
        return "# Does DreamBooth do here what the paper says?\n\nNothing has been measured yet.\n"
    parts = [_introduction(rows), _summary(rows)]
    parts += [_section(name, ablation, rows, sheets) for name, ablation in ABLATIONS.items()]
    return "\n".join([*parts, _ceiling(rows, ceiling or {}), notes.strip()]) + "\n"


def _ceiling(rows: Sequence[Row], ceiling: Mapping[str, Mapping[str, float]]) -> str:
    if not ceiling:
        return ""
    lines = [
        "## What EN0-I can reach",
        "",
        "Each picture of a subject against its other pictures (`python -m benchmarks.quality.metric_ceiling`), beside "
        "what runs reach.",
        "",
        "| subject | pictures | through the autoencoder | blurred by 2 pixels | untrained base | reference | off |",
        "|---|---|---|---|---|---|---|",
    ]
    for subject, found in ceiling.items():
        reached = [
            mean_of(values_of(rows, variant, "EN0-I", [subject])).value
            for variant in ("untrained", "reference", "without_prior")
        ]
        cells = [f"{value:.3f}" for value in found.values()] + [
            "-" if value is None else f"{value:.3f}" for value in reached
        ]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _introduction(rows: Sequence[Row]) -> str:
    recipe = next((row["recipe"] for row in rows if row["variant"] == "reference"), rows[0]["recipe"])
    measured = {row["subject"] for row in rows}
    names = {
        kind: [name for name, subject in BY_NAME.items() if subject.kind == kind and name in measured]
        for kind in ("drawn", "photo")
    }
    keys = sorted({row["base"] for row in rows})
    text = INTRODUCTION.read_text(encoding="utf-8").format(
        subjects=f"{len(names['drawn'])} held-out drawings ({', '.join(names['drawn'])}) and {len(names['photo'])} "
        f"photographed ones ({', '.join(names['photo'])})",
        steps=recipe["training.max_train_steps"],
        batch=recipe["training.train_batch_size"],
        rate=recipe["training.learning_rate"],
        text_rate=recipe["training.learning_rate_text_encoder"],
        class_images=recipe["prior.num_class_images"],
        context=recipe["samples"]["context"],
        sampling_steps=recipe["samples"]["num_inference_steps"],
        last_steps=recipe["last_steps"],
    )
    hours = sum(row["seconds"] for row in rows) / 3600
    return text + (
        f"* **Measured**: {len(rows)} runs, {hours:.1f} hours on one thread of a busy CPU, base {', '.join(keys)}.\n"
    )


def _summary(rows: Sequence[Row]) -> str:
    lines = [
        "## What is expected, and what is seen here",
        "",
        "Last column: against a second run of the reference, with a learning rate 0.1 % higher, where the first run is "
        "the reference. Where the two columns differ, chance decides.",
        "",
        "| ablation | metric | variant | expected | here | against the control |",
        "|---|---|---|---|---|---|",
    ]
    for ablation in ABLATIONS.values():
        for (metric, variant), expected in ablation.paper.items():
            difference = _difference(rows, ablation, variant, metric)
            control = _difference(rows, ablation, variant, metric, against=CONTROL)
            again = _verdict(control) if ablation.reference == "reference" and control.value is not None else ""
            compared = f"{ablation.labels[variant]} against {ablation.labels[ablation.reference]}"
            cells = (ablation.title, metric, compared, WORDS[expected], _verdict(difference), again)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _verdict(difference: Score) -> str:
    if difference.value is not None and difference.num_subjects < FEW:
        return f"{difference.num_subjects} subjects, too few to tell: {_signed(difference)}"
    found = direction(difference)
    return f"{WORDS[found] if found in (0, None) else f'**{WORDS[found]}**'}: {_signed(difference)}"


def _section(name: str, ablation: Ablation, rows: Sequence[Row], sheets: Path | None) -> str:
    parts = [f"## {ablation.title}", "", ablation.question, ""]
    parts += _table(ablation, rows)
    parts += ["", f"Against “{ablation.labels[ablation.reference]}”:", ""]
    for variant, label in ablation.labels.items():
        if variant != ablation.reference and VARIANTS[variant].trained:
            parts += [
                f"* {_sentence(metric, label, _difference(rows, ablation, variant, metric))}"
                for metric in ablation.metrics
            ]
    parts += _against_control(ablation, rows)
    parts += ["", f"In the paper: {ablation.paper_text}", ""]
    if missing := missing_runs(ablation, rows):
        parts += [f"Missing, not measured for want of time: {missing}.", ""]
    if sheets is not None and (sheets / f"{name}.png").is_file():
        parts += [
            f"![{ablation.title}](images/quality/{name}.png)",
            "",
            "Each row: two images of the subject, two in the context, two of the class.",
            "",
        ]
    return "\n".join(parts)


def _sentence(metric: str, label: str, difference: Score) -> str:
    if difference.interval is None or not 1 < difference.num_subjects < FEW:
        return sentence(metric, f"“{label}”", difference)
    return f"{metric} with “{label}”: {_signed(difference)} ({difference.num_subjects} subjects, too few to tell)."


def _against_control(ablation: Ablation, rows: Sequence[Row]) -> list[str]:
    """Say the same against the second run of the reference, a line for each variant."""
    lines = []
    for variant, label in ablation.labels.items():
        differences = {
            metric: _difference(rows, ablation, variant, metric, against=CONTROL) for metric in ablation.metrics
        }
        if variant in (ablation.reference, CONTROL, "untrained") or any(
            difference.value is None for difference in differences.values()
        ):
            continue
        found = "; ".join(f"{metric} {_verdict(difference)}" for metric, difference in differences.items())
        lines.append(f"* “{label}”: {found}.")
    if ablation.reference != "reference" or not lines:
        return []
    return [
        "",
        "The same against the control, a second run of the reference with a learning rate 0.1 % higher:",
        "",
        *lines,
    ]


def _table(ablation: Ablation, rows: Sequence[Row]) -> list[str]:
    lines = ["| | " + " | ".join(ablation.metrics) + " | runs |", "|---|" + "---|" * (len(ablation.metrics) + 1)]
    for variant, label in ablation.labels.items():
        scores = [mean_of(_values(rows, ablation, variant, metric)) for metric in ablation.metrics]
        count = max(len(_values(rows, ablation, variant, metric)) for metric in ablation.metrics)
        cells = " | ".join(_plain(score) for score in scores)
        lines.append(f"| {label} | {cells} | {count or 'none: not measured'} |")
    if "EN0-I" in ablation.metrics:
        real = mean_of(_values(rows, ablation, ablation.reference, "EN0-I real"))
        cells = " | ".join(_plain(real) if metric == "EN0-I" else "" for metric in ablation.metrics)
        lines.append(f"| the pictures among themselves | {cells} | |")
    return lines


def missing_runs(ablation: Ablation, rows: Sequence[Row]) -> str:
    """Say which runs of an ablation have no row: by variant, the subjects and seeds."""
    done = {(row["variant"], row["subject"], row["seed"]) for row in rows}
    missing: dict[str, list[str]] = {}
    for variant, subject, seed in runs_of(ablation, VARIANTS):
        if (variant, subject, seed) not in done:
            missing.setdefault(variant, []).append(f"{subject} (seed {seed})" if seed else subject)
    return "; ".join(f"“{ablation.labels[variant]}” of {', '.join(runs)}" for variant, runs in missing.items())


def _values(rows: Sequence[Row], ablation: Ablation, variant: str, metric: str) -> dict[tuple[str, int], float]:
    """Return a metric by subject and seed, of the runs that all measured variants have."""
    found = values_of(rows, variant, metric, ablation.subjects)
    common = common_runs(ablation, rows)
    if not VARIANTS[variant].trained:
        subjects = {subject for subject, _ in common}
        return {run: value for run, value in found.items() if run[0] in subjects}
    return {run: value for run, value in found.items() if run in common}


def common_runs(ablation: Ablation, rows: Sequence[Row]) -> set[tuple[str, int]]:
    """Return subjects and seeds that every trained variant of an ablation has, variants without any row left out."""
    runs: dict[str, set[tuple[str, int]]] = {}
    for row in rows:
        name, run = row["variant"], (row["subject"], row["seed"])
        if (
            name in ablation.labels
            and VARIANTS[name].trained
            and run[0] in ablation.subjects
            and run[1] in ablation.seeds
        ):
            runs.setdefault(name, set()).add(run)
    return set.intersection(*runs.values()) if runs else set()


def _difference(rows: Sequence[Row], ablation: Ablation, variant: str, metric: str, against: str = "") -> Score:
    reference = _values(rows, ablation, against or ablation.reference, metric)
    return paired_difference(_values(rows, ablation, variant, metric), reference)


def _plain(score: Score) -> str:
    if score.value is None:
        return "-"
    if score.interval is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} [{score.interval[0]:.3f}, {score.interval[1]:.3f}]"


def _signed(score: Score) -> str:
    if score.value is None or score.interval is None:
        return "-"
    return f"{score.value:+.3f} [{score.interval[0]:+.3f}, {score.interval[1]:+.3f}]"


def write_sheets(pictures: Path, sheets: Path) -> None:
    """Make a contact sheet for each ablation from the pictures of a drawn and a photographed subject, or of two."""
    for name, ablation in ABLATIONS.items():
        rows = []
        for subject in [one for one in SHEET_SUBJECTS if one in ablation.subjects] or ablation.subjects[:2]:
            for variant, label in ablation.labels.items():
                strip = pictures / f"{variant}-{subject}-0.png"
                if strip.is_file():
                    rows.append((f"{subject}: {label.replace('λ', 'lambda')}", thumbnails(strip)))  # not in the font
        if rows:
            save_sheet(rows, sheets / f"{name}.png")


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--pictures", type=Path, help="folder of the pictures of the runs")
    arguments = parser.parse_args()
    sheets = arguments.page.parent / "images" / "quality"
    if arguments.pictures is not None:
        write_sheets(arguments.pictures, sheets)
    notes = NOTES.read_text(encoding="utf-8") if NOTES.is_file() else ""
    measured = arguments.results / CEILING
    ceiling = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
    text = page(read_rows(arguments.results), notes, ceiling=ceiling, sheets=sheets)
    arguments.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
