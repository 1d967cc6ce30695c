"""What every card does with the open configurations, as Markdown: ``python -m tools.cards docs/cards.md README.md``.

The tables stand between two marks; the README has some of the cards. It takes minutes.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lowmem_db.config import shipped
from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import open_paths
from lowmem_db.environment import GIB
from lowmem_db.planning.cards import CARDS, Card, find_card
from lowmem_db.planning.plan import Plan
from lowmem_db.planning.survey import survey

SHOWN = (
    find_card("RTX 3050 4GB"), find_card("GTX 1660 Ti"), find_card("RTX 4060"), find_card("RTX 3060"), find_card("T4"),
    find_card("RTX 4060 Ti 16GB"), find_card("RTX 3090"), find_card("RTX 5090"),
)  # fmt: skip
_TABLE = re.compile(r"(?<=<!-- cards -->\n).*?(?=<!-- end of cards -->)", re.DOTALL)
Cells = Mapping[str, Mapping[str, str]]  # configuration, card


def open_configurations() -> list[str]:
    """Return the configurations for every card: those that leave it to the planner how memory is saved."""
    return [name for name in shipped.names() if len(open_paths(load_config(Path(name)))) >= 6 and "_t4" not in name]


def cells_of(name: str) -> dict[str, str]:
    """Return what each card does with a configuration."""
    cards = sorted({*CARDS, *SHOWN}, key=lambda card: card.memory_gib)
    return {card.name: _cell(plan) for card, plan in survey(load_config(Path(name)), cards=cards)}


def render(cells: Cells, cards: Sequence[Card]) -> str:
    """Return a table with a row for each card."""
    return "\n".join(_rows(cells, cards)) + "\n"


def _rows(cells: Cells, cards: Sequence[Card]) -> Iterator[str]:
    yield f"| card | {' | '.join(f'`{name}`' for name in cells)} |"
    yield "|---" * (len(cells) + 1) + "|"
    for card in cards:
        memory = "" if f"{card.memory_gib:.0f}GB" in card.name else f", {card.memory_gib:.0f} GB"
        yield f"| {card.name}{memory} | {' | '.join(of_card[card.name] for of_card in cells.values())} |"


def _cell(plan: Plan | None) -> str:
    return "-" if plan is None else f"{plan.seconds_per_step:.2f} s, {plan.peak_bytes / GIB:.1f} GiB"


if __name__ == "__main__":
    found = {name: cells_of(name) for name in open_configurations() if name != "demo"}
    everything = sorted({*CARDS, *SHOWN}, key=lambda card: (card.memory_gib, card.tflops))
    for number, file in enumerate(map(Path, sys.argv[1:])):
        table = render(found, SHOWN if number else everything)
        text = _TABLE.sub(lambda _, table=table: table, file.read_text(encoding="utf-8"))
        file.write_text(text, encoding="utf-8")
