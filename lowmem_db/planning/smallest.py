"""The smallest budget that is enough, and the fields of a configuration that keep it from being smaller."""

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
    "class_images": "; to lower it, reduce prior.sample_batch_size, or for a LoRA set lora.base_weights=nf4",
    "encode_images": "; to lower it, reduce data.resolution",
    "sample": "; to lower it, reduce sampling.num_images, or leave out sampling.prompts and evaluation.every",
    "train": "; a frozen text encoder, optimizer.name=adamw8bit or a smaller data.resolution may lower it",
}


@dataclass(frozen=True)
class Smallest:
    """The strategy that needs the least memory.

    Attributes:
        strategy: The strategy, as a resolved configuration.
        phases: The memory of its phases.
        num_bytes: Bytes that the run needs, including the allowance.
    """

    strategy: Config
    phases: list[PhaseMemory]
    num_bytes: int

    @property
    def budget(self) -> str:
        """A budget that is enough, rounded up to a tenth of a GiB."""
        return f"{self._tenths / 10:.1f}GiB"

    @property
    def budget_bytes(self) -> int:
        """The bytes of that budget."""
        return self._tenths * GIB // 10

    @property
    def _tenths(self) -> int:
        return math.ceil(self.num_bytes / GIB * 10)

    def describe(self) -> str:
        """Return its budget, its name and the phase of its peak, in words."""
        peak = max(self.phases, key=lambda phase: phase.parts.total)
        return (
            f"{self.budget}: {describe(self.strategy)}; its peak is in the phase {peak.name}"
            f"{_ADVICE.get(peak.name, '')}"
        )


def find_smallest(needs: Needs, strategies: Sequence[Config]) -> Smallest:
    """Find the strategy that needs the least memory.

    Args:
        needs: Tells what strategies need.
        strategies: All that can be chosen; not empty.
    """
    best: Smallest | None = None
    by_effort = sorted(strategies, key=effort_of, reverse=True)
    for strategy in sorted(by_effort, key=needs.at_least):  # the first one is often the best and rules out most others
        if best is not None and needs.at_least(strategy) >= best.num_bytes:
            break
        if best is None or needs.training(strategy) < best.num_bytes:
            phases = needs.phases(strategy)
            found = Smallest(strategy, phases, needs.of_phases(phases))
            best = found if best is None or found.num_bytes < best.num_bytes else best
    assert best is not None, "no strategy to choose from"
    return best


def given_fields(config: Config) -> list[StrategyField]:
    """Return the strategy fields that a configuration gives, so that the planner does not choose them."""
    return [field for field in fields() if field.of(config) is not None and field.applies(config)]


def without(config: Config, given: Sequence[StrategyField]) -> Config:
    """Return a configuration that leaves these fields open."""
    return changed(config, {field.path: None for field in given})


def in_the_way(config: Config, needs: Needs, best: Smallest) -> list[StrategyField]:
    """Return the given fields of a configuration that must be left out for the smallest budget that is named.

    Args:
        config: The configuration.
        needs: Tells what strategies need.
        best: The smallest strategy without any of the fields.
    """
    strategy, needed = best.strategy, []
    for field in given_fields(config):
        kept = changed(strategy, {field.path: field.of(config)})
        if kept == strategy:
            continue
        if refusals(kept) or needs.whole_run(kept) > best.budget_bytes:
            needed.append(field)
        else:
            strategy = kept
    return needed
