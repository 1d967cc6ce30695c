"""Predicts the memory and time of strategies from as few traces as possible.

What a strategy keeps between steps is predicted separately from what its steps add. The form of the weights and the
place of the optimizer states change only the former, the placement of activation checkpoints only the latter. Steps are
traced with one placement for all blocks; mixed placements are composed from the figures of the blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from lowmem_db.config.schema import Config, Placement
from lowmem_db.config.strategy import Trace, changed, key_of, overhead_of
from lowmem_db.planning.candidates import placement_of
from lowmem_db.planning.cards import Crossing, measured_ratio, seconds_per_step
from lowmem_db.planning.costs import Attention, Costs
from lowmem_db.planning.exchange import Exchange, exchange_of
from lowmem_db.planning.phases import (
    Traced,
    TracedRun,
    trace_class_images,
    trace_encode_images,
    trace_encode_text,
    trace_residents,
    trace_sample,
    trace_train,
)
from lowmem_db.planning.timeline import END, BlockFigures, mixed_peak
from lowmem_db.records import MemoryParts, PhaseMemory

_ON_HOST = {
    "memory.optimizer_step": "host", "memory.stream_weights": True, "memory.stream_optimizer_state": True,
    "memory.optimizer_in_backward": True, "memory.checkpointing": "segments",
}  # fmt: skip
_RECOMPUTED = {"none": 0.0, "layers": 1.0, "segments": 1.0, "nested": 2.0}  # forward passes of a block


@dataclass(frozen=True)
class Traces:
    """What was traced so far; it holds for every card that is not the CPU.

    Attributes:
        phases: Traces of phases.
        residents: What stays in memory between steps.
    """

    phases: dict[Any, Traced] = field(default_factory=dict)
    residents: dict[Any, Traced] = field(default_factory=dict)


class Predictor:
    """Predicts bytes and seconds of strategies, each given as a resolved configuration.

    Args:
        run: The run to plan.
        strategies: Candidates without mixed placements. All figures are derived from traces like that of the first
            one, but with the optimizer in the backward pass if that is a candidate too.
        traces: Those of the same run for another card. Default: none yet.
    """

    def __init__(self, run: TracedRun, strategies: Sequence[Config], traces: Traces | None = None) -> None:
        self.run = run
        self._by_residents = {key_of(strategy, "resident"): strategy for strategy in reversed(strategies)}
        alike = [strategy for strategy in strategies if _differ_only_in_stepping(strategy, strategies[0])]
        self._first = max(alike, key=lambda strategy: bool(strategy.memory.optimizer_in_backward))
        known = traces or Traces()
        self._traces, self._residents = known.phases, known.residents
        self._trained: dict[Any, int] = {}

    @cached_property
    def block_names(self) -> list[str]:
        """Names of the blocks in the order of the forward pass."""
        return list(self.train(self._first).blocks)[:-1]

    @cached_property
    def attentions(self) -> frozenset[Attention]:
        """What attention computes the backward pass of in a step; with parts of a batch, of fewer samples."""
        return self.train(self._first).costs.attentions

    def before_training(self, strategy: Config) -> list[PhaseMemory]:
        """Return the phases before training."""
        found = []
        if strategy.prior.enabled:
            found.append(phase_of("class_images", self.class_images(strategy)))
        found.append(phase_of("encode_images", self.encode_images(strategy)))
        if not strategy.runs_text_encoders:
            found.append(phase_of("encode_text", self._traced("encode_text", strategy, trace_encode_text)))
        return found

    def class_images(self, strategy: Config) -> Traced:
        """Return the trace of one batch of class images, drawn in one step."""
        return self._traced("class_images", strategy, trace_class_images)

    def encode_images(self, strategy: Config) -> Traced:
        """Return the trace of the encoding of one image."""
        return self._traced("encode_images", strategy, trace_encode_images)

    def samples(self, strategy: Config) -> Traced:
        """Return the trace of the samples of one prompt, drawn in one step."""
        return self._traced("sample", strategy, trace_sample)

    def train(self, strategy: Config) -> Traced:
        """Return the trace of a step with exactly this strategy."""
        return self._traced("train", strategy, trace_train)

    def resident(self, strategy: Config) -> Traced:
        """Return what stays in memory between steps."""
        key = key_of(strategy, "resident")
        if key not in self._residents:
            weights = key_of(strategy, "weights")
            alike = {k: other for k, other in self._by_residents.items() if key_of(other, "weights") == weights}
            traced = trace_residents(self.run, [*alike.values()] or [strategy])
            self._residents.update(zip(alike or [key], traced, strict=True))
        return self._residents[key]

    def train_bytes(self, strategy: Config) -> int:
        """Predict the peak of training."""
        own = key_of(strategy, "train")
        if ("train", own) in self._traces:
            return self._traces["train", own].peak.total
        key = key_of(strategy, "resident") + own
        if key not in self._trained:
            self._trained[key] = self.resident(strategy).resident.total + mixed_peak(self._figures(strategy))
        return self._trained[key]

    def sample(self, strategy: Config) -> MemoryParts:
        """Predict the peak of samples during training, while the model and its optimizer stay in memory."""
        drawn, resident = self.samples(strategy), self.resident(strategy).resident
        return replace(
            resident,
            weights=drawn.peak.weights,
            activations=drawn.peak.activations,
            other=resident.other + drawn.peak.other,
        )

    def seconds(self, strategy: Config) -> float:
        """Predict the seconds of a step: those of the first trace, plus recomputation and copies.

        They do not depend on other traces, so that the order of strategies is the same for every budget.
        """
        costs, again = self._costs(strategy)
        seconds = seconds_per_step(costs, self.run.card, again=again, crossing=self.crossing(strategy))
        return seconds * measured_ratio(self.run.card, strategy) * (1.0 + overhead_of(strategy))

    def crossing(self, strategy: Config) -> Crossing:
        """Return what streams beside a step: weights as often as their segments compute, and states both ways.

        Where the step is on the host, gradients go out, and the weights that stay on the device with them and back.
        """
        kept = self.resident(strategy)
        states = kept.pinned_bytes - kept.streamed_bytes
        times = 2 if strategy.memory.checkpointing == "nested" else 1
        if strategy.memory.optimizer_step == "host":
            staying = kept.trained_bytes - kept.streamed_trained_bytes
            return Crossing(
                forward=kept.streamed_bytes,
                backward=times * kept.streamed_bytes + staying,
                back=kept.trained_bytes + staying,
            )
        return Crossing(
            forward=kept.streamed_bytes,
            backward=times * kept.streamed_bytes + states,
            back=kept.streamed_trained_bytes + states,
        )

    def exchange(self, strategy: Config) -> Exchange:
        """Return what crosses between the cards of several processes in a step."""
        return exchange_of(strategy, self.resident(strategy).trained_bytes, self.run.card)

    def _traced(self, phase: Trace, strategy: Config, trace: Callable[[TracedRun], Traced]) -> Traced:
        """Return the trace of a phase, which is shared by all strategies with the same key."""
        key = (phase, key_of(strategy, phase))
        if key not in self._traces:
            self._traces[key] = trace(replace(self.run, config=strategy))
        return self._traces[key]

    def _costs(self, strategy: Config) -> tuple[Costs, np.ndarray]:
        """Return the costs of the first trace, and how often more than there a strategy runs each operator."""
        first = self._first
        if strategy.memory.optimizer_step == "host" != first.memory.optimizer_step:
            first = changed(first, _ON_HOST | {"training.clipping": strategy.training.clipping})
        if not strategy.trains_weights:
            frozen = {"lora.base_weights": strategy.lora.base_weights}
            first = changed(first, frozen | {"training.mixed_precision": strategy.training.mixed_precision})
        costs = self.train(first).costs
        again = np.zeros(len(costs.flops))
        for index, name in enumerate(costs.block_names):
            more = _RECOMPUTED[placement_of(strategy, name)] - _RECOMPUTED[placement_of(first, name)]
            again[costs.block == index] = more
        return costs, again

    def _figures(self, strategy: Config) -> dict[str, BlockFigures]:
        """Return the figures of each block, from traces in which all blocks have its placement."""
        names = self.block_names
        placements: dict[str, Placement] = {name: placement_of(strategy, name) for name in names}
        placements[END] = placements[names[-1]]
        traced = {placement: self._traced_uniformly(strategy, placement) for placement in set(placements.values())}
        return {name: traced[placement].blocks[name] for name, placement in placements.items()}

    def _traced_uniformly(self, strategy: Config, placement: Placement) -> Traced:
        first = self._first.memory
        uniform: dict[str, object] = {
            "memory.weights": "fp32" if strategy.memory.weights == "fp32" else first.weights,
            "memory.checkpointing": placement,
        }
        is_itself = strategy.memory.optimizer_step == "host" and strategy.memory.checkpointing == placement
        if not is_itself:  # else what its step adds depends on what streams, and no other strategy needs this trace
            uniform["memory.stream_optimizer_state"] = first.stream_optimizer_state
            uniform["memory.stream_weights"] = first.stream_weights
        return self.train(changed(strategy, uniform))


def _differ_only_in_stepping(strategy: Config, other: Config) -> bool:
    """Return whether two strategies differ only in when the optimizer steps."""
    memory, training = other.memory, other.training
    when = {"memory.optimizer_in_backward": memory.optimizer_in_backward, "training.clipping": training.clipping}
    return changed(strategy, when) == other


def phase_of(name: str, traced: Traced) -> PhaseMemory:
    """Return what a phase needs."""
    return PhaseMemory(name=name, parts=traced.peak, host_bytes=traced.host_bytes, pinned_bytes=traced.pinned_bytes)
