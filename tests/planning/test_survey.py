"""One table for many cards: the same figures as each card's own plan."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowmem_db import console
from lowmem_db.config.schema import Config
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning import survey as survey_module
from lowmem_db.planning.cards import Card, find_card
from lowmem_db.planning.plan import Plan, plan
from lowmem_db.planning.survey import survey, surveyed, table_of
from lowmem_db.planning.target import Target
from tests.planning.conftest import make_config
from tools.survey import row_of

Plans = list[tuple[Card, Plan | None]]
CARDS = (find_card("rtx 3060"), find_card("t4"), replace(find_card("rtx 2060"), name="Too small", memory_gib=0.1))


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> Config:
    return make_config(model__base=str(tiny_model), prior__enabled=False)


@pytest.fixture(scope="module")
def plans(config: Config) -> Plans:
    return list(survey(config, cards=CARDS))


@pytest.fixture
def known(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the survey quick."""
    monkeypatch.setattr(survey_module, "survey", lambda config, cards: iter(plans))


def test_every_card_has_the_row_of_its_own_plan(config: Config, plans: Plans) -> None:
    assert [card for card, _ in plans] == list(CARDS)
    for card, found in plans[:2]:
        alone = plan(config, Target(card=card, budget_bytes=card.usable_bytes))
        assert found is not None
        assert (found.config, found.phases) == (alone.config, alone.phases)
        assert f"| {found.seconds_per_step:.2f} |" in row_of(card, found)
    assert plans[2][1] is None
    assert row_of(*plans[2]) == "| Too small 0GB | - | - | - | does not fit |"
    out = Console(width=80, file=io.StringIO(), record=True)
    out.print(table_of(plans))
    printed = out.export_text()
    assert all(card.name in printed for card in CARDS)
    assert "does not fit" in printed


@pytest.mark.usefixtures("known")
def test_each_card_is_said_when_it_is_known(
    plans: Plans, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said_before: list[str] = []

    def remember(card: Card, plan: Plan | None) -> str:
        said_before.append(capsys.readouterr().err)
        return described(card, plan)

    described = survey_module._in_a_line
    monkeypatch.setattr(survey_module, "_in_a_line", remember)
    assert surveyed(make_config(), cards=CARDS) == plans
    lines = [*"".join(said_before).splitlines(), *filter(None, capsys.readouterr().err.splitlines())]  # rich < 14.3: ""
    assert lines[0] == "planning for 3 cards; the first of them take longest"
    assert [line.partition(", ")[0] for line in lines[1:]] == [
        *(f"card {number}/3: {card.name}: {plan.peak_bytes / 2**30:.1f} GiB"
          for number, (card, plan) in enumerate(plans[:2], 1) if plan is not None),
        "card 3/3: Too small: does not fit",
    ]  # fmt: skip
    assert said_before[1].startswith("card 1/3: RTX 3060: ")


@pytest.mark.usefixtures("known")
def test_a_terminal_shows_a_bar_and_the_newest_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console.console, "_force_terminal", True)
    monkeypatch.setattr(console.console, "is_interactive", True)
    monkeypatch.setattr(console.console, "_width", 100)
    surveyed(make_config(), cards=CARDS)
    shown = capsys.readouterr().err
    assert "planning" in shown
    assert "Too small: does not fit" in shown
    assert "card 1/3" not in shown


def test_a_model_is_built_once_for_all_cards(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights its parameters are counted by building it."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    built: list[str] = []
    load = ModelFolder.load

    def counted(self: ModelFolder, component: str, *given: Any, **more: Any) -> Any:
        built.append(component)
        return load(self, component, *given, **more)

    monkeypatch.setattr(ModelFolder, "load", counted)
    config = make_config(model__base=str(bare), prior__enabled=False)
    counts = []
    for cards in (CARDS[:1], CARDS[:1], CARDS[:1] * 2):  # some tables of a process are filled at the first time
        built.clear()
        list(survey(config, cards=cards))
        counts.append(len(built))
    assert counts[0] >= counts[1] == counts[2] > 0
