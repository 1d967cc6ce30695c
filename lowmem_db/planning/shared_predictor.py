"""Predicts what each process needs of a model that is shared out between them.

A step is traced in one process, which holds the whole model, with the optimizer in the backward pass. What the step
adds to the whole model, it adds to a part of it; beside that, there are weights and gradients of the layer at work.
"""

from collections.abc import Sequence
from dataclasses import replace

from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed
from lowmem_db.planning.exchange import Exchange, exchange_of_shards
from lowmem_db.planning.phases import Traced, TracedRun
from lowmem_db.planning.predictor import Predictor, Traces
from lowmem_db.planning.timeline import mixed_peak
from lowmem_db.records import PARTS, MemoryParts


class SharedPredictor(Predictor):
    """A predictor for ``distributed.sharding=full``; arguments as for :class:`Predictor`."""

    def __init__(self, run: TracedRun, strategies: Sequence[Config], traces: Traces | None = None) -> None:
        super().__init__(run, strategies)
        alone = [_alone(strategy) for strategy in strategies]
        self._of_one = Predictor(replace(run, config=_alone(run.config)), alone, traces)

    def train(self, strategy: Config) -> Traced:
        """Return the trace of a step, with what a process has of the model."""
        alone = _alone(strategy)
        traced, whole = self._of_one.train(alone), self._of_one.resident(alone).resident
        kept = self.resident(strategy)
        parts = {
            part: getattr(traced.peak, part) - getattr(whole, part) + getattr(kept.resident, part) for part in PARTS
        }
        parts["gradients"] += _gradients(strategy, kept)
        parts["other"] += sum(kept.passing)
        return replace(traced, peak=MemoryParts(**parts))

    def train_bytes(self, strategy: Config) -> int:
        """Predict the peak of training."""
        kept = self.resident(strategy)
        added = mixed_peak(self._of_one._figures(_alone(strategy)))
        return kept.resident.total + added + _gradients(strategy, kept) + sum(kept.passing)

    def samples(self, strategy: Config) -> Traced:
        """Return the trace of the samples of one prompt, drawn in one step."""
        drawn, kept = self._of_one.samples(_alone(strategy)), self.resident(strategy)
        more = drawn.peak.weights - self._of_one.resident(_alone(strategy)).resident.weights
        weights = kept.resident.weights + more
        return replace(drawn, peak=replace(drawn.peak, weights=weights, other=drawn.peak.other + kept.passing[0]))

    def exchange(self, strategy: Config) -> Exchange:
        """Return what crosses between the cards in a step."""
        whole = self._of_one.resident(_alone(strategy))
        return exchange_of_shards(strategy, whole.resident.weights, whole.trained_bytes, self.run.card)


def _alone(strategy: Config) -> Config:
    """Return a strategy of one process that frees gradients as early as several do."""
    values: dict[str, object] = {"distributed.sharding": "none"}
    if strategy.memory.optimizer_in_backward is not None:
        values |= {"memory.optimizer_in_backward": True, "training.clipping": "none"}
    return changed(strategy, values)


def _gradients(strategy: Config, kept: Traced) -> int:
    """Return the bytes of the gradients that a process keeps until it steps."""
    return 0 if strategy.memory.optimizer_in_backward else kept.trained_bytes
