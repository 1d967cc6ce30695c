"""Writes the pages of quality in ``docs`` from committed rows and hand-written notes alone.

    python -m benchmarks.quality.write_quality [--pictures runs/quality/pictures]

With ``--pictures`` the contact sheets are made anew from the pictures of the runs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import first_regimes, kept_places, ten_subjects
from benchmarks.quality.contact_sheet import save_sheet, small, thumbnails
from benchmarks.quality.lists import VARIANTS
from benchmarks.quality.results import Row, read_rows, values_of
from benchmarks.quality.statistics import direction, mean_of, paired_difference
from benchmarks.quality.subjects import BY_NAME
from benchmarks.quality.variants import Ablation, runs_of
from lowmem_db.evaluation.metrics import Score

RESULTS = Path("benchmarks/results/quality")
FOLDER = Path(__file__).parent
FEW = 5
"""With fewer subjects an interval is hardly more than the spread between them, and no direction is called shown."""
WORDS = {1: "higher", -1: "lower", 0: "no difference shown", None: "not measured"}
OF_42_NOUNS = "23fb34b"
CEILING = "metric_ceiling.json"
Ceiling = Mapping[str, Mapping[str, Mapping[str, float]]]
"""What `metric_ceiling` found, by subject and metric."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of ablations that share a recipe.

    Attributes:
        name: Name of its file, and of its introduction and notes in this folder.
        ablations: What it shows.
        reference: The variant whose recipe the introduction describes.
        control: A second run of the reference, with a learning rate 0.1 % higher.
        ceiling: The metric whose ceiling is shown.
        reached: What is shown beside it: variants and their metrics, by heading.
        pictured: Subjects of the contact sheets.
        commit: The last commit whose package has the base that this was measured on; empty: it is today's.
    """

    name: str
    ablations: Mapping[str, Ablation]
    reference: str
    control: str
    ceiling: str
    reached: Mapping[str, tuple[str, str]]
    pictured: tuple[str, ...]
    commit: str = ""


def _identity_reached(reference: str) -> dict[str, tuple[str, str]]:
    return {
        "untrained base, in contexts": (f"{reference}_untrained", "ID-I context"),
        "reference, plain": (reference, "ID-I plain"),
        "reference, in contexts": (reference, "ID-I context"),
        "prior preservation off, in contexts": (f"{reference}_without_prior", "ID-I context"),
    }


PLACES = Page(
    name="quality",
    ablations=kept_places.ABLATIONS,
    reference="places",
    control="places_again",
    ceiling="ID-I",
    reached=_identity_reached("places"),
    pictured=("drawn_backpack", "drawn_shoe"),
)
TEN = Page(
    name="quality_earlier_base",
    ablations=ten_subjects.ABLATIONS,
    reference="demo",
    control="demo_again",
    ceiling="ID-I",
    reached=_identity_reached("demo"),
    pictured=("drawn_backpack", "drawn_shoe"),
    commit=OF_42_NOUNS,
)
FIRST = Page(
    name="quality_first_regimes",
    ablations=first_regimes.ABLATIONS,
    reference="reference",
    control="nearly_the_reference",
    ceiling="EN0-I",
    reached={
        "untrained base": ("untrained", "EN0-I"),
        "reference": ("reference", "EN0-I"),
        "off": ("without_prior", "EN0-I"),
    },
    pictured=("drawn_dog", "dog3"),
    commit=OF_42_NOUNS,
)
PAGES = (PLACES, TEN, FIRST)


def write(
    page: Page,
    all_rows: Sequence[Row],
    introduction: str,
    notes: str,
    *,
    ceiling: Ceiling | None = None,
    sheets: Path | None = None,
) -> str:
    """Return the text of a page.

    Args:
        page: The page.
        all_rows: The rows, also those of other pages.
        introduction: How it begins, with places for what the recipe says.
        notes: What was found out by hand, in Markdown.
        ceiling: What `metric_ceiling` found.
        sheets: Folder of the contact sheets, or None for a page without pictures.
    """
    variants = {variant for ablation in page.ablations.values() for variant in ablation.labels}
    rows = [row for row in all_rows if row["variant"] in variants]
    if not rows:
        return "# Does DreamBooth do here what the paper says?\n\nNothing has been measured yet.\n"
    parts = [_introduction(page, rows, introduction), *_all_subjects(page, sheets), _summary(page, rows)]
    parts += [_section(page, name, rows, sheets) for name in page.ablations]
    return "\n".join([*parts, _ceiling(page, rows, ceiling or {}), notes.strip()]) + "\n"


def _ceiling(page: Page, rows: Sequence[Row], ceiling: Ceiling) -> str:
    measured = {row["subject"] for row in rows}
    figures = {subject: found[page.ceiling] for subject, found in ceiling.items() if subject in measured}
    if not figures:
        return ""
    kinds = list(dict.fromkeys(kind for found in figures.values() for kind in found))
    heading = ["subject", *kinds, *page.reached]
    lines = [
        f"## What {page.ceiling} can reach",
        "",
        "Each picture of a subject against its other pictures, as they are, worsened, and the drawing itself composed "
        "into the contexts (`python -m benchmarks.quality.metric_ceiling`), beside what runs reach.",
        "",
        f"| {' | '.join(heading)} |",
        "|---" * len(heading) + "|",
    ]
    for subject, found in figures.items():
        reached = [mean_of(values_of(rows, *run, [subject])).value for run in page.reached.values()]
        cells = [*map(found.get, kinds), *reached]
        lines.append(f"| {subject} | {' | '.join('-' if cell is None else f'{cell:.3f}' for cell in cells)} |")
    return "\n".join([*lines, ""])


def _introduction(page: Page, rows: Sequence[Row], introduction: str) -> str:
    recipe = next((row["recipe"] for row in rows if row["variant"] == page.reference), rows[0]["recipe"])
    measured = {row["subject"] for row in rows}
    names = {
        kind: [name for name, subject in BY_NAME.items() if subject.kind == kind and name in measured]
        for kind in ("drawn", "photo")
    }
    keys = sorted({row["base"] for row in rows})
    text = introduction.format(
        subjects=f"{len(names['drawn'])} held-out drawings ({', '.join(names['drawn'])})"
        + (f" and {len(names['photo'])} photographed ones ({', '.join(names['photo'])})" if names["photo"] else ""),
        steps=recipe["training.max_train_steps"],
        batch=recipe["training.train_batch_size"],
        rate=recipe["training.learning_rate"],
        text_rate=recipe["training.learning_rate_text_encoder"],
        class_images=recipe["prior.num_class_images"],
        context=", ".join(VARIANTS[page.reference].contexts),
        sampling_steps=recipe["samples"]["num_inference_steps"],
        last_steps=recipe["last_steps"],
    )
    hours = sum(row["seconds"] for row in rows) / 3600
    measured = f"{len(rows)} runs, {hours:.1f} hours on one thread of a busy CPU, base {', '.join(keys)}"
    again = f"; check it out to measure a row again: `git worktree add ../earlier_base {page.commit}`"
    return f"{text}* **Measured**: {measured}{again if page.commit else ''}.\n"


def _all_subjects(page: Page, sheets: Path | None) -> list[str]:
    if sheets is None or not (sheets / f"{page.name}.png").is_file():
        return []
    return [
        "## All subjects",
        "",
        f"![Every subject after the reference run](images/quality/{page.name}.png)",
        "",
        f"Two of the five pictures of each subject; then, after the reference run, {_columns(page.reference)}. Seed 0, "
        "the first two of four images.",
        "",
    ]


def _columns(variant: str) -> str:
    """Say what a row of a contact sheet shows."""
    return f"two images of the subject, two {', two '.join(VARIANTS[variant].contexts)}, and two of the class"


def _summary(page: Page, rows: Sequence[Row]) -> str:
    lines = [
        "## What is expected, and what is seen here",
        "",
        "Last column: against a second run of the reference, with a learning rate 0.1 % higher, on the subjects "
        "that have one. Where the two columns differ, chance or these subjects decide.",
        "",
        "| ablation | metric | variant | expected | here | against the control |",
        "|---|---|---|---|---|---|",
    ]
    for ablation in page.ablations.values():
        for (metric, variant), expected in ablation.paper.items():
            difference = _difference(rows, ablation, variant, metric)
            control = _difference(rows, ablation, variant, metric, against=page.control)
            is_compared = ablation.reference == page.reference and control.num_subjects >= FEW
            again = _verdict(control) if is_compared else ""
            compared = f"{ablation.labels[variant]} against {ablation.labels[ablation.reference]}"
            cells = (ablation.title, metric, compared, WORDS[expected], _verdict(difference), again)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _verdict(difference: Score) -> str:
    if difference.value is None:
        return WORDS[None]
    if difference.num_subjects < FEW:
        few = "1 subject" if difference.num_subjects == 1 else f"{difference.num_subjects} subjects"
        return f"{few}, too few to tell: {_signed(difference)}"
    found = direction(difference)
    return f"{WORDS[found] if found in (0, None) else f'**{WORDS[found]}**'}: {_signed(difference)}"


def _section(page: Page, name: str, rows: Sequence[Row], sheets: Path | None) -> str:
    ablation = page.ablations[name]
    parts = [f"## {ablation.title}", "", ablation.question, "", *_table(ablation, rows)]
    parts += ["", *_differences(ablation, rows, ablation.reference, f"against “{ablation.labels[ablation.reference]}”")]
    parts += _against_control(page, ablation, rows)
    parts += ["", f"In the paper: {ablation.paper_text}", ""]
    if missing := missing_runs(ablation, rows):
        parts += [
            f"Not measured yet (`python -m benchmarks.quality.ablations {name}` goes on): {missing}.",
            "",
        ]
    if sheets is not None and (sheets / f"{name}.png").is_file():
        parts += [
            f"![{ablation.title}](images/quality/{name}.png)",
            "",
            f"Each row: {_columns(ablation.reference)}.",
            "",
        ]
    return "\n".join(parts)


def _differences(ablation: Ablation, rows: Sequence[Row], reference: str, heading: str) -> list[str]:
    """Return a table of the differences of the trained variants to one of them; none where nothing was measured."""
    columns = {
        variant: label
        for variant, label in ablation.labels.items()
        if variant not in (reference, ablation.reference) and VARIANTS[variant].trained
    }
    cells = {
        metric: [_difference(rows, ablation, variant, metric, against=reference) for variant in columns]
        for metric in ablation.metrics
    }
    if all(difference.value is None for found in cells.values() for difference in found):
        return []
    lines = [f"| {heading} | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    return lines + [f"| {metric} | {' | '.join(map(_verdict, found))} |" for metric, found in cells.items()]


def _against_control(page: Page, ablation: Ablation, rows: Sequence[Row]) -> list[str]:
    if ablation.reference != page.reference:
        return []
    done = len({subject for subject, _ in _values(rows, ablation, page.control, ablation.metrics[0])})
    table = _differences(ablation, rows, page.control, "against the control") if done >= FEW else []
    return (
        ["", "The control is a second run of the reference with a learning rate 0.1 % higher:", "", *table]
        if table
        else []
    )


def _table(ablation: Ablation, rows: Sequence[Row]) -> list[str]:
    last = ["runs", *(["in the paper"] if ablation.figures else [])]
    heading = ["", *ablation.metrics, *last]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for variant, label in ablation.labels.items():
        scores = [mean_of(_values(rows, ablation, variant, metric)) for metric in ablation.metrics]
        count = max(len(_values(rows, ablation, variant, metric)) for metric in ablation.metrics)
        cells = [label, *(_plain(score) for score in scores), str(count or "none: not measured")]
        cells += [ablation.figures.get(variant, "")] if ablation.figures else []
        lines.append(f"| {' | '.join(cells)} |")
    if "EN0-I" in ablation.metrics:
        real = mean_of(_values(rows, ablation, ablation.reference, "EN0-I real"))
        cells = [_plain(real) if metric == "EN0-I" else "" for metric in ablation.metrics]
        lines.append(f"| the pictures among themselves | {' | '.join([*cells, *[''] * len(last)])} |")
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
    if score.value is None:
        return "-"
    if score.interval is None:
        return f"{score.value:+.3f}"
    return f"{score.value:+.3f} [{score.interval[0]:+.3f}, {score.interval[1]:+.3f}]"


def write_subjects(page: Page, pictures: Path, sheets: Path) -> None:
    """Make a contact sheet of all subjects of a page: two of their pictures beside what the reference draws."""
    names = dict.fromkeys(name for ablation in page.ablations.values() for name in ablation.subjects)
    strips = {name: pictures / f"{page.reference}-{name}-0.png" for name in names}
    rows = [
        (BY_NAME[name].noun, [*map(small, BY_NAME[name].pictures[:2]), *thumbnails(strip)])
        for name, strip in strips.items()
        if strip.is_file()
    ]
    if rows:
        save_sheet(rows, sheets / f"{page.name}.png", colours=256)


def write_sheets(page: Page, pictures: Path, sheets: Path) -> None:
    """Make a contact sheet for each ablation from the pictures of a few subjects that all variants have."""
    for name, ablation in page.ablations.items():
        rows = []
        for subject in [one for one in page.pictured if one in ablation.subjects] or ablation.subjects[:2]:
            strips = {variant: pictures / f"{variant}-{subject}-0.png" for variant in ablation.labels}
            if all(strip.is_file() for strip in strips.values()):
                rows += [
                    (f"{subject}: {_in_font(label)}", thumbnails(strips[one])) for one, label in ablation.labels.items()
                ]
        if rows:
            save_sheet(rows, sheets / f"{name}.png")


def _in_font(label: str) -> str:
    return label.replace("λ", "lambda")


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures of the runs")
    arguments = parser.parse_args()
    sheets = arguments.docs / "images" / "quality"
    measured = arguments.results / CEILING
    ceiling = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
    for page in PAGES:
        if arguments.pictures is not None:
            write_subjects(page, arguments.pictures, sheets)
            write_sheets(page, arguments.pictures, sheets)
        introduction, notes = (
            (FOLDER / f"{page.name}_{part}.md").read_text(encoding="utf-8") for part in ("introduction", "notes")
        )
        text = write(page, read_rows(arguments.results), introduction, notes, ceiling=ceiling, sheets=sheets)
        (arguments.docs / f"{page.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
