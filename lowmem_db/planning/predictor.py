"""Figures of strategies from as few traces as they need.

What a strategy keeps between steps, and what its steps add to that, are told apart: the kinds of weights of one type
and where optimizer states live change the first alone, the placement of checkpoints the second alone. Steps are traced
with one placement for all blocks; mixtures are put together from the figures of their blocks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowmem_db.config.strategy import Strategy
from lowmem_db.planning.candidates import differ_in_when_alone, placement_of
from lowmem_db.planning.cards import operator_seconds, pcie_seconds
from lowmem_db.planning.phases import Subject, Traced, trace_residents, trace_sample, trace_train
from lowmem_db.planning.timeline import END, BlockFigures, mixed_peak
from lowmem_db.records import MemoryParts

_OVERHEAD = 0.03  # of a step, for each kind of copies to the host and back: they take bandwidth and launches
_RECOMPUTED = {"none": 0.0, "layers": 1.0, "segments": 1.0, "nested": 2.0}  # forward passes of a block


class Predictor:
    """Predicts bytes and seconds of strategies.

    Args:
        subject: What is planned.
        strategies: Candidates without mixtures of placements. All figures are derived from traces like that of the
            first which steps in the backward pass or, where that is ruled out, after it.
    """

    def __init__(self, subject: Subject, strategies: Sequence[Strategy]) -> None:
        self.subject = subject
        self._kinds = {_kind(strategy): strategy for strategy in strategies}
        alike = [each for each in strategies if differ_in_when_alone(each, strategies[0])]
        self._first = max(alike, key=lambda each: each.optimizer_in_backward)
        self._traced: dict[Any, Traced] = {}
        self._residents: dict[Any, Traced] = {}
        self._samples: dict[Any, Traced] = {}

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks in the order of the forward pass."""
        return list(self.traced(self._first).blocks)[:-1]

    def traced(self, strategy: Strategy) -> Traced:
        """Return the trace of exactly this strategy."""
        key = _key(strategy)
        if key not in self._traced:
            self._traced[key] = trace_train(self.subject, strategy)
        return self._traced[key]

    def resident(self, strategy: Strategy) -> Traced:
        """Return what stays in memory between steps."""
        if _kind(strategy) not in self._residents:
            kinds = {kind: each for kind, each in self._kinds.items() if _has_weights_of(each, strategy)}
            self._residents.update(zip(kinds, trace_residents(self.subject, list(kinds.values())), strict=True))
        return self._residents[_kind(strategy)]

    def train_bytes(self, strategy: Strategy) -> int:
        """Predict the peak of training."""
        if _key(strategy) in self._traced:
            return self.traced(strategy).peak.total
        return self.resident(strategy).resident.total + mixed_peak(
            {name: self._figures(strategy, name) for name in self.traced(self._first).blocks}
        )

    def sample(self, strategy: Strategy) -> MemoryParts:
        """Predict the peak of the samples during training: the model and its optimizer stay in memory."""
        key = (strategy.weights == "fp32", strategy.base_weights, strategy.autocast, strategy.tiled_samples)
        if key not in self._samples:
            self._samples[key] = trace_sample(self.subject, strategy)
        drawn, resident = self._samples[key], self.resident(strategy).resident
        return replace(
            resident,
            weights=drawn.peak.weights,
            activations=drawn.peak.activations,
            other=resident.other + drawn.peak.other,
        )

    def seconds(self, strategy: Strategy) -> float:
        """Predict the seconds of a step: those of the first trace, and what is recomputed or copied beside it.

        They do not depend on what else was traced, so that strategies have one order whatever the budget.
        """
        step = self._computing_seconds(strategy)
        crossing = self.resident(strategy).host_bytes if strategy.stream_optimizer_state else 0
        overhead = _OVERHEAD * (strategy.stream_optimizer_state + strategy.offload_checkpoints)
        return max(step, pcie_seconds(crossing, self.subject.card)) * (1.0 + overhead)

    def _computing_seconds(self, strategy: Strategy) -> float:
        frozen = {"base_weights": strategy.base_weights, "mixed_precision": strategy.mixed_precision}
        first = self.traced(self._first if strategy.base_weights is None else replace(self._first, **frozen))
        seconds = operator_seconds(first.costs, self.subject.card)
        total = float(seconds.sum())
        for index, name in enumerate(first.costs.block_names):
            again = _RECOMPUTED[placement_of(strategy, name)] - _RECOMPUTED[placement_of(self._first, name)]
            total += again * float(seconds[first.costs.block == index].sum())
        return total

    def _figures(self, strategy: Strategy, block: str) -> BlockFigures:
        """Return the figures of one block from a trace in which all blocks have its placement."""
        placement = placement_of(strategy, self.block_names[-1] if block == END else block)
        weights = strategy.weights if strategy.weights == "fp32" else self._first.weights
        uniform = replace(
            strategy,
            weights=weights,
            stream_optimizer_state=self._first.stream_optimizer_state,
            checkpointing=placement,
        )
        return self.traced(uniform).blocks[block]


def _kind(strategy: Strategy) -> tuple[str, str | None, bool]:
    """Return what the bytes between steps depend on."""
    return strategy.weights, strategy.base_weights, strategy.stream_optimizer_state


def _has_weights_of(strategy: Strategy, other: Strategy) -> bool:
    """Say whether the weights in memory are of one type under two strategies."""
    is_fp32 = [each.weights == "fp32" for each in (strategy, other)]
    return is_fp32[0] == is_fp32[1] and strategy.base_weights == other.base_weights


def _key(strategy: Strategy) -> tuple[Any, ...]:
    """Return what a trace depends on, as something that can be looked up."""
    placement = strategy.checkpointing
    return (
        strategy.weights,
        strategy.base_weights,
        strategy.mixed_precision,
        strategy.optimizer_in_backward,
        strategy.stream_optimizer_state,
        placement if isinstance(placement, str) else tuple(sorted(placement.items())),
        strategy.offload_checkpoints,
        strategy.clipping,
    )
