"""Where to go when a run is out of memory although its plan fitted: strategies that need less and train the same.

Only fields that the planner has chosen and that change no loss are changed; what the user gave stays.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import Literal

from lowmem_db.config import choices
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed, fields
from lowmem_db.out_of_memory import Place
from lowmem_db.planning.phases import TracedRun
from lowmem_db.planning.plan import Planner

Phase = Literal["train", "sample"]
_PARTS = "memory.micro_batches"
_STEP = 0.98  # of the bytes before: a smaller difference is lost in the gaps between tensors


class Ladder:
    """The strategies below the one that a run was started with.

    Args:
        run: The run, with its resolved configuration.
        chosen: Paths of the fields that the planner has chosen.
        budget_bytes: Bytes of the device that the run may use.
    """

    def __init__(self, run: TracedRun, chosen: Collection[str], budget_bytes: int) -> None:
        self._run = run
        self._chosen = chosen
        self._budget_bytes = budget_bytes

    def below(self, strategy: Config, phase: Phase, place: Place) -> Config | None:
        """Return the fastest strategy that needs less than another; None if nothing needs less.

        Args:
            strategy: The one that needs too much.
            phase: What ran out of memory.
            place: Whose memory was too small.
        """
        now = self._bytes(strategy, phase, place)
        allowed = max(self._budget_bytes, self._planner.needs.whole_run(strategy))
        smaller = {}
        for other in self._strategies:
            needed = self._bytes(other, phase, place)
            if needed < now and self._planner.needs.whole_run(other) <= allowed:
                smaller.setdefault(needed <= now * _STEP, []).append(other)
        found = smaller.get(True) or smaller.get(False) or []
        return min(found, key=self._planner.preference, default=None)

    def smallest(self) -> str:
        """Return the smallest budget that any of the strategies is predicted to need, in words."""
        return self._planner.smallest().describe()

    @cached_property
    def _planner(self) -> Planner:
        config = self._run.config
        free = [field.path for field in fields() if field.is_exact and field.path in self._chosen]
        return Planner(replace(self._run, config=changed(config, dict.fromkeys(free))))

    @cached_property
    def _strategies(self) -> list[Config]:
        kept, _ = self._planner.candidates()
        kept += [changed(each, {_PARTS: parts}) for each in kept for parts in self._parts(each)]
        return [tiled for strategy in kept for tiled in self._planner.with_tiled_samples(strategy)]

    def _parts(self, strategy: Config) -> list[int]:
        return [*choices.micro_batches(strategy)] if _PARTS in self._chosen else []

    def _bytes(self, strategy: Config, phase: Phase, place: Place) -> int:
        predictor = self._planner.predictor
        if place == "host" and not self._run.card.is_cpu:
            crossing = predictor.resident(strategy).host_bytes
            return predictor.train(strategy).host_bytes if strategy.memory.offload_checkpoints else crossing
        return predictor.sample(strategy).total if phase == "sample" else predictor.train_bytes(strategy)
