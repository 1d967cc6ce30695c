"""One table for many cards: the same figures as each card's own plan."""

import io
from dataclasses import replace

from rich.console import Console

from lowmem_db.planning.cards import find_card
from lowmem_db.planning.plan import plan
from lowmem_db.planning.survey import survey, table_of
from lowmem_db.planning.target import Target
from tests.planning.conftest import make_config
from tools.survey import row_of

CARDS = (find_card("rtx 3060"), find_card("t4"), replace(find_card("rtx 2060"), name="Too small", memory_gib=0.1))


def test_every_card_has_the_row_of_its_own_plan(tiny_model):
    config = make_config(model__base=str(tiny_model), prior__enabled=False)
    plans = list(survey(config, cards=CARDS))
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
