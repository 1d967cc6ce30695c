"""Write what the open configurations do on cards of each size: ``python -m tools.survey docs/memory/every_card.md``.

Takes a quarter of an hour, because every strategy is traced for every kind of card; run it when the planner changes.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowmem_db.cli.arguments import read_arguments
from lowmem_db.config.strategy import describe
from lowmem_db.environment import GIB
from lowmem_db.planning.cards import Card, find_card
from lowmem_db.planning.output import in_words
from lowmem_db.planning.plan import Plan
from lowmem_db.planning.survey import survey

CONFIGURATIONS = ("sd15", "sd15_lora", "sdxl", "sdxl_lora")
CARDS = ("RTX 2060", "RTX 4060", "RTX 3060", "RTX 4060 Ti 16GB", "RTX 4090", "T4")
TITLE = """# What each configuration does on your card

Written by `python -m tools.survey docs/memory/every_card.md`. Predicted, not measured. The peak is that of the whole
run, in GiB; the time is that of the whole run without loading and downloads. `lowmem-db plan NAME --gpu "rtx 3060"`
says it for your card and your settings, and `lowmem-db plan NAME --all-gpus` for thirty cards, in some minutes.
"""


def row_of(card: Card, plan: Plan | None) -> str:
    """Return a row of a Markdown table."""
    if plan is None:
        cells = ["-", "-", "-", "does not fit"]
    else:
        seconds = sum(plan.seconds.values())
        peak, pace = f"{plan.peak_bytes / GIB:.1f}", f"{plan.seconds_per_step:.2f}"
        cells = [peak, pace, in_words(seconds), describe(plan.config)]
    name = card.name if card.name.endswith("GB") else f"{card.name} {card.memory_gib:.0f}GB"
    return f"| {' | '.join([name, *cells])} |"


def lines_of(names: Sequence[str], cards: Sequence[Card]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield TITLE
    for name in names:
        yield f"## `{name}`\n"
        yield "| card | peak | s/step | whole run | how |\n|---|---|---|---|---|"
        config = read_arguments([name], needs_photos=False).config
        yield from (row_of(card, plan) for card, plan in survey(config, cards=cards))
        yield ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    page = parser.parse_args().page
    page.write_text("\n".join(lines_of(CONFIGURATIONS, [find_card(name) for name in CARDS])), encoding="utf-8")
