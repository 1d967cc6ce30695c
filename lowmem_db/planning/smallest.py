"""The smallest budget that would do, and what a configuration gives that keeps it from being smaller."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_db.config.rules import refusals
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import StrategyField, changed, describe, effort_of, fields
from lowmem_db.environment import GIB
from lowmem_db.planning.needs import Needs
from lowmem_db.records import PhaseMemory

_ADVICE = {
    "class_images": "; a smaller prior.sample_batch_size, for a LoRA lora.base_weights=nf4, lower it",
    "encode_images": "; a smaller data.resolution lowers it",
    "sample": "; fewer sampling.num_images, or no sampling.prompts and no evaluation.every, lower it",
    "train": "; a frozen text encoder, optimizer.name=adamw8bit or a smaller data.resolution may lower it",
}


@dataclass(frozen=True)
class Smallest:
    """The strategy that needs the least.

    Attributes:
        strategy: As a resolved configuration.
        phases: What its phases need.
        num_bytes: What the run needs, with what is set aside.
    """

    strategy: Config
    phases: list[PhaseMemory]
    num_bytes: int

    @property
    def budget(self) -> str:
        """A budget that is enough: the next tenth of a GiB."""
        return f"{math.ceil(self.num_bytes / GIB * 10) / 10:.1f}GiB"

    def describe(self) -> str:
        """Say what budget it would do with, what it is called, and where its peak is."""
        peak = max(self.phases, key=lambda phase: phase.parts.total)
        return (
            f"{self.budget}: {describe(self.strategy)}; its peak is in the phase {peak.name}"
            f"{_ADVICE.get(peak.name, '')}"
        )


def find_smallest(needs: Needs, strategies: Sequence[Config]) -> Smallest:
    """Find the strategy that needs the least of all.

    Args:
        needs: What strategies need.
        strategies: All that can be chosen; not empty.
    """
    best: Smallest | None = None
    by_effort = sorted(strategies, key=effort_of, reverse=True)
    for strategy in sorted(by_effort, key=needs.at_least):  # the first is often the best, and rules most others out
        if best is not None and needs.at_least(strategy) >= best.num_bytes:
            break
        if best is None or needs.training(strategy) < best.num_bytes:
            phases = needs.phases(strategy)
            found = Smallest(strategy, phases, needs.of_phases(phases))
            best = found if best is None or found.num_bytes < best.num_bytes else best
    assert best is not None, "no strategy to choose from"
    return best


def given_fields(config: Config) -> list[StrategyField]:
    """Return the fields of a strategy that a configuration gives, so that the planner does not choose them."""
    return [field for field in fields() if field.of(config) is not None and field.applies(config)]


def without(config: Config, given: Sequence[StrategyField]) -> Config:
    """Return a configuration that leaves fields open."""
    return changed(config, {field.path: None for field in given})


def in_the_way(config: Config, needs: Needs, best: Smallest) -> list[StrategyField]:
    """Return the fields that a configuration gives and that have to be left out for a smaller strategy.

    Args:
        config: The configuration.
        needs: What strategies need.
        best: The smallest strategy without any of the fields.
    """
    strategy, needed = best.strategy, []
    for field in given_fields(config):
        kept = changed(strategy, {field.path: field.of(config)})
        if kept == strategy:
            continue
        if refusals(kept) or needs.whole_run(kept) > best.num_bytes:
            needed.append(field)
        else:
            strategy = kept
    return needed
