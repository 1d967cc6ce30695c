from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.quality import rescore
from benchmarks.quality.contact_sheet import save_strip
from benchmarks.quality.lists import VARIANTS
from benchmarks.quality.runs import Drawn, recipe_of
from benchmarks.quality.subjects import Subject
from benchmarks.quality.variants import Variant

GROUPS = 5


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def scores_of(drawn: Drawn, subject: Subject, variant: Variant, work: Path) -> dict[str, float]:
        (first, *_) = drawn.contexts["at night"]
        return {"EN0-I": 0.5, "new": float(first.getpixel((0, 0))[0])}  # type: ignore[index]

    monkeypatch.setattr(rescore, "scores_of", scores_of)
    recipe = recipe_of(VARIANTS["demo"])
    return {
        "variant": "demo",
        "subject": "drawn_cup",
        "seed": 0,
        "base": "b",
        "EN0-I": 0.5,
        "loss_prior": 0.2,
        "seconds": 1.0,
        "recipe": recipe,
    }


def save(work: Path) -> None:
    plain, snow, beach, night, of_class = ([Image.new("RGB", (8, 8), (shade, 0, 0))] * 4 for shade in range(GROUPS))
    contexts = {"in the snow": snow, "on the beach": beach, "at night": night}
    save_strip(Drawn(plain=plain, contexts=contexts, of_class=of_class), work / "pictures" / "demo-drawn_cup-0.png")


def test_figures_of_today_come_from_the_pictures_of_a_run(row: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path)
    found = rescore.rescored({**row, "old": 0.1}, tmp_path)
    assert found == {**row, "new": 3.0}
    assert list(found)[-2:] == ["seconds", "recipe"]


def test_rows_without_pictures_stay(row: dict[str, Any], tmp_path: Path) -> None:
    assert rescore.rescored(row, tmp_path) is row


def test_pictures_of_another_run_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(SystemExit, match=r"EN0-I is 0.5, and 0.6 in the row"):
        rescore.rescored({**row, "EN0-I": 0.6}, tmp_path)
