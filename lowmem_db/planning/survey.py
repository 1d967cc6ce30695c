"""What a configuration does on every card: one set of traces serves them all."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import describe
from lowmem_db.console import progress, say
from lowmem_db.engine.build import Prepared
from lowmem_db.environment import GIB
from lowmem_db.errors import ConfigError
from lowmem_db.models.finding import model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.cards import CARDS, Card
from lowmem_db.planning.output import in_words
from lowmem_db.planning.phases import TracedRun
from lowmem_db.planning.plan import Plan, Planner
from lowmem_db.planning.predictor import Traces


def survey(
    config: Config, *, model: ModelFolder | None = None, cards: Sequence[Card] = CARDS
) -> Iterator[tuple[Card, Plan | None]]:
    """Yield each card with the plan for its memory, or None if nothing fits or the card cannot compute it.

    Args:
        config: The configuration.
        model: The model. Default: the one named by ``model.base``.
        cards: The cards.

    Raises:
        ModelError: The model's configuration files cannot be found.
    """
    traces, found = Traces(), model or model_of(config, weights=False)
    prepared: dict[Any, Prepared] = {}
    for card in cards:
        try:
            run = TracedRun(config=config, model=found, card=card, prepared=prepared)
            yield card, Planner(run, traces).find(card.usable_bytes)
        except ConfigError:
            yield card, None


def surveyed(config: Config, *, cards: Sequence[Card] = CARDS) -> list[tuple[Card, Plan | None]]:
    """Return what :func:`survey` yields; each card is also shown when it is known, because all of them take minutes."""
    plans: list[tuple[Card, Plan | None]] = []
    with progress() as bar:
        if bar.disable:
            say(f"planning for {len(cards)} cards; the first of them take longest")
        for card, found in bar.track(survey(config, cards=cards), total=len(cards), description="planning"):
            plans.append((card, found))
            bar.details = _in_a_line(card, found)
            if bar.disable:
                say(f"card {len(plans)}/{len(cards)}: {bar.details}")
    return plans


def table_of(plans: Sequence[tuple[Card, Plan | None]]) -> Table:
    """Return a table of one configuration on many cards."""
    table = Table("card", "memory", "peak", "s/step", "in all", "how", box=None, pad_edge=False)
    for card, plan in plans:
        memory = f"{card.memory_gib:.0f} GB"
        if plan is None:
            table.add_row(card.name, memory, "-", "-", "-", "does not fit")
        else:
            peak, pace = f"{plan.peak_bytes / GIB:.1f}", f"{plan.seconds_per_step:.2f}"
            table.add_row(card.name, memory, peak, pace, in_words(sum(plan.seconds.values())), describe(plan.config))
    return table


def _in_a_line(card: Card, plan: Plan | None) -> str:
    if plan is None:
        return f"{card.name}: does not fit"
    peak, pace = f"{plan.peak_bytes / GIB:.1f} GiB", f"{plan.seconds_per_step:.2f} s/step"
    return f"{card.name}: {peak}, {pace}, {describe(plan.config)}"
