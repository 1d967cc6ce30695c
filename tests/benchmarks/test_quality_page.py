import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.quality.contact_sheet import save_strip
from benchmarks.quality.lists import VARIANTS
from benchmarks.quality.results import append_row, read_rows
from benchmarks.quality.runs import Drawn, recipe_of
from benchmarks.quality.statistics import direction, mean_of, paired_difference
from benchmarks.quality.write_quality import (
    CEILING,
    FIRST,
    FOLDER,
    PAGES,
    RESULTS,
    TEN,
    Page,
    write,
    write_sheets,
    write_subjects,
)

FIDELITY = {("drawn_dog", 0): 0.6, ("drawn_dog", 1): 0.8, ("dog3", 0): 0.3}


def row(variant: str, subject: str, seed: int, fidelity: float, preservation: float) -> dict[str, Any]:
    return {
        "variant": variant,
        "subject": subject,
        "seed": seed,
        "base": "abc",
        "EN0-I": fidelity,
        "EN0-I real": 0.9,
        "EN0-PRES": preservation,
        "EN0-DIV": 0.25,
        "EN0-CLASS": 0.7,
        "seconds": 36.0,
        "recipe": recipe_of(VARIANTS[variant]),
    }


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    for number, subject in enumerate(("drawn_dog", "drawn_cat", "dog3")):
        append_row(tmp_path, row("without_prior", subject, 0, 0.6, 0.5 + number / 100))
        append_row(tmp_path, row("reference", subject, 0, 0.5 + number / 10, 0.4))
    return read_rows(tmp_path)


def test_subjects_count_the_same_whatever_their_seeds() -> None:
    assert mean_of(FIDELITY).value == pytest.approx((0.7 + 0.3) / 2)
    assert mean_of(FIDELITY).num_subjects == 2


def test_differences_are_paired() -> None:
    difference = paired_difference({("dog3", 0): 0.5, ("dog3", 7): 9.0}, FIDELITY)
    assert difference.value == pytest.approx(0.2)
    assert direction(difference) is None


def page(rows: list[dict[str, Any]], notes: str, shown: Page = FIRST, **others: Any) -> str:
    return write(shown, rows, "{subjects}\n", notes, **others)


@pytest.mark.parametrize("change", [0.2, -0.2, 0.0])
def test_a_direction_is_shown_where_the_interval_leaves_out_zero(change: float) -> None:
    reference = {("dog3", 0): 0.5, ("drawn_dog", 0): 0.4}
    moved = {("dog3", 0): 0.5 + change + 0.1, ("drawn_dog", 0): 0.4 + change - 0.1}
    assert direction(paired_difference(moved, reference)) == (change > 0) - (change < 0)


@pytest.fixture
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.write_quality.FEW", 2)


def test_few_subjects_show_no_direction(rows: list[dict[str, Any]]) -> None:
    text = page(rows, "")
    assert "| EN0-PRES | 3 subjects, too few to tell: -0.110 [-0.120, -0.100] |" in text
    assert "| lower | 3 subjects, too few to tell: -0.110 [-0.120, -0.100] |" in text


@pytest.mark.usefixtures("few_are_enough")
def test_tables_hold_the_means_computed_by_hand(rows: list[dict[str, Any]]) -> None:
    text = page(rows, "## Notes\n\nBy hand.")
    assert "| on (λ = 1) | 0.600 [0.500, 0.700] | 0.400 [0.400, 0.400] |" in text
    assert "| off | 0.600 [0.600, 0.600] | 0.510 [0.500, 0.520] |" in text
    assert "| the pictures among themselves | 0.900 [0.900, 0.900] |" in text
    assert "| EN0-PRES | **lower**: -0.110 [-0.120, -0.100] |" in text
    assert "| EN0-I | no difference shown: +0.000 [-0.100, +0.100] |" in text
    assert text.rstrip().endswith("By hand.")
    assert "6 runs, 0.1 hours" in text


def test_variants_are_compared_on_the_same_runs(rows: list[dict[str, Any]]) -> None:
    text = page([*rows, row("reference", "drawn_car", 0, 0.9, 0.9)], "")
    assert "| on (λ = 1) | 0.600 [0.500, 0.700] | 0.400 [0.400, 0.400] |" in text


@pytest.mark.usefixtures("few_are_enough")
def test_a_second_run_of_the_reference_shows_chance(rows: list[dict[str, Any]]) -> None:
    controls = [row("nearly_the_reference", subject, 0, 0.55, 0.4) for subject in ("drawn_dog", "dog3")]
    variants = [row("lambda_3", subject, 0, 0.45, 0.4) for subject in ("drawn_dog", "dog3")]
    text = page([*rows, *controls, *variants], "")
    section = text.split("## Text encoder")[1].split("\n## ")[0]
    first, control = section.split("The control is a second run")
    assert "| against “text encoder trained, λ = 1, 24 class images” |" in first
    assert "**lower**: -0.150 [-0.250, -0.050]" in first
    assert "| against the control |" in control
    assert "**lower**: -0.100 [-0.100, -0.100]" in control


def test_what_is_missing_is_said(rows: list[dict[str, Any]]) -> None:
    text = page(rows, "")
    assert "| wrong | - | - | - | - | none: not measured |" in text
    assert "`python -m benchmarks.quality.ablations noun` goes on" in text
    prior = text.split("## Prior preservation")[1].split("\n## ")[0]
    assert "“off” of drawn_clock" in prior
    assert "“on (λ = 1)” of drawn_dog," not in prior


def test_the_ceiling_stands_beside_what_runs_reach(rows: list[dict[str, Any]]) -> None:
    text = page(rows, "", ceiling={"dog3": {"EN0-I": {"pictures": 0.529, "blurred": 0.3}}})
    assert "| dog3 | 0.529 | 0.300 | - | 0.700 | 0.600 |" in text


def test_rows_stand_on_the_page_of_their_recipe_beside_the_papers_figures(rows: list[dict[str, Any]]) -> None:
    ours = [row(variant, "drawn_cup", 0, fidelity, 0.4) for variant, fidelity in (("demo", 0.6), ("demo_no_noun", 0.5))]
    text = page([*rows, *ours], "", TEN)
    assert "1 held-out drawings (drawn_cup)\n" in text
    assert "2 runs, " in text
    assert "| 1 | DINO 0.303, CLIP-I 0.607 |" in text
    assert "| EN0-I | not measured | 1 subject, too few to tell: -0.100 |" in text
    assert "drawn_dog" not in page([*rows, *ours], "", TEN).split("## What is expected")[0]


@pytest.mark.parametrize("shown", PAGES, ids=[shown.name for shown in PAGES])
def test_pages_are_written_from_what_is_committed(shown: Page) -> None:
    introduction, notes = (
        (FOLDER / f"{shown.name}_{part}.md").read_text(encoding="utf-8") for part in ("introduction", "notes")
    )
    ceiling = json.loads((RESULTS / CEILING).read_text(encoding="utf-8"))
    sheets = Path("docs/images/quality")
    text = write(shown, read_rows(RESULTS), introduction, notes, ceiling=ceiling, sheets=sheets)
    assert text == Path(f"docs/{shown.name}.md").read_text(encoding="utf-8")


def test_a_page_without_rows_says_so() -> None:
    assert "Nothing has been measured" in page([], "")


def test_sheets_are_small_pictures_of_few_colours(tmp_path: Path) -> None:
    images = [Image.effect_noise((128, 128), 60).convert("RGB") for _ in range(4)]
    for variant in ("without_prior", "reference", "untrained", "wrong_noun"):
        drawn = Drawn(plain=images, contexts={"in the snow": images}, of_class=images)
        save_strip(drawn, tmp_path / "pictures" / f"{variant}-drawn_dog-0.png")
    write_sheets(FIRST, tmp_path / "pictures", tmp_path / "sheets")
    assert [file.name for file in (tmp_path / "sheets").iterdir()] == ["prior.png"]
    with Image.open(tmp_path / "sheets" / "prior.png") as sheet:
        assert sheet.mode == "P"
        assert sheet.width < 600


def test_a_sheet_shows_every_subject_that_was_run(tmp_path: Path) -> None:
    images = [Image.new("RGB", (16, 16), "blue")] * 4
    drawn = Drawn(plain=images, contexts=dict.fromkeys(("a", "b", "c"), images), of_class=images)
    for subject in ("drawn_cup", "drawn_fish"):
        save_strip(drawn, tmp_path / f"demo-{subject}-0.png")
    write_subjects(TEN, tmp_path, tmp_path / "sheets")
    write_subjects(FIRST, tmp_path, tmp_path / "sheets")
    assert [file.name for file in (tmp_path / "sheets").iterdir()] == ["quality_earlier_base.png"]
    with Image.open(tmp_path / "sheets" / "quality_earlier_base.png") as sheet:
        assert sheet.width > 12 * 80
        assert 2 * 80 < sheet.height < 3 * 80
