"""The plan of a run: the fastest strategy whose peak fits the budget, and why each faster one was refused."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import Strategy
from lowmem_db.environment import GIB
from lowmem_db.errors import BudgetError
from lowmem_db.models.finding import model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.allowance import allowance_bytes
from lowmem_db.planning.candidates import candidates, describe, num_measures, open_choices
from lowmem_db.planning.phases import (
    Subject,
    Traced,
    trace_class_images,
    trace_encode_images,
    trace_encode_text,
)
from lowmem_db.planning.predictor import Predictor
from lowmem_db.planning.target import Target
from lowmem_db.records import MemoryPlan, PhaseMemory, Refusal

Plan = MemoryPlan[Strategy]
_ADVICE = {
    "class_images": "; a smaller prior.sample_batch_size, for a LoRA lora.base_weights=nf4, lower it",
    "encode_images": "; a smaller data.resolution lowers it",
    "sample": "; fewer sampling.num_images, or no sampling.prompts and no evaluation.every, lower it",
    "train": "; a frozen text encoder, optimizer.name=adamw8bit or a smaller data.resolution may lower it",
}


def plan(config: Config, target: Target, *, model: ModelFolder | None = None) -> Plan:
    """Plan a run.

    Args:
        config: The configuration; what it leaves open is chosen.
        target: The device and the budget.
        model: Its configuration files are enough; found by ``model.base`` where it is left out.

    Raises:
        BudgetError: Nothing fits; the message names the smallest budget that would do.
        ConfigError: A rule refuses every strategy.
        ModelError: The model's configuration files are nowhere.
    """
    subject = Subject(config=config, model=model or model_of(config, weights=False), card=target.card)
    return Planner(subject).plan(target.budget_bytes, notes=target.notes)


class Planner:
    """Plans one configuration for any number of budgets; what was traced for one serves the others.

    Args:
        subject: What is planned.

    Raises:
        ConfigError: A rule refuses every strategy.
    """

    def __init__(self, subject: Subject) -> None:
        self._started = time.perf_counter()
        self.subject = subject
        self.predictor = Predictor(subject, open_choices(subject.config, subject.card))

    def plan(self, budget_bytes: int, *, notes: Sequence[str] = ()) -> Plan:
        """Plan for a budget.

        Args:
            budget_bytes: What the run may use of the device.
            notes: Remarks that come before those of the plan.

        Raises:
            BudgetError: Nothing fits.
        """
        found = _Search(self, budget_bytes).run()
        seconds = round(time.perf_counter() - self._started, 2)
        self._started = time.perf_counter()
        return replace(found, notes=(*notes, *found.notes), seconds_to_plan=seconds)

    @cached_property
    def phases_before_training(self) -> list[PhaseMemory]:
        """Phases that no strategy changes."""
        config = self.subject.config
        phases = [_phase("class_images", trace_class_images(self.subject))] if config.prior.enabled else []
        phases.append(_phase("encode_images", trace_encode_images(self.subject)))
        if not config.training.train_text_encoder:
            phases.append(_phase("encode_text", trace_encode_text(self.subject)))
        return phases


class _Search:
    """The search for the strategy of one budget."""

    def __init__(self, planner: Planner, budget_bytes: int) -> None:
        self._subject = planner.subject
        self._predictor = planner.predictor
        self._before = planner.phases_before_training
        self._budget_bytes = budget_bytes

    def run(self) -> Plan:
        config, card = self._subject.config, self._subject.card
        kept, refused = candidates(config, card, self._predictor.block_names)
        too_large: set[str] = set()
        before = self._before
        if self._needed(before) > self._budget_bytes:
            raise self._too_small(kept, before)
        for strategy in sorted(kept, key=self._preference):
            family = _family(strategy)
            if family in too_large:
                continue
            refusal, tiled = self._predict(strategy)
            if refusal is None:
                phases = [*before, *self._phases_of_training(tiled)]
                if self._needed(phases) <= self._budget_bytes:
                    return self._plan(tiled, phases, refused)
                refusal = self._refusal(tiled, self._needed(phases))
            elif refusal.strategy == family:
                too_large.add(family)
            refused.append(refusal)
        raise self._too_small(kept, before)

    def _preference(self, strategy: Strategy) -> tuple[object, ...]:
        """Return what strategies are ordered by: exact weights come before speed, and fewer measures break a tie."""
        is_rounded = strategy.weights == "bf16_stochastic" or strategy.base_weights in {"int8", "nf4"}
        return is_rounded, round(self._predictor.seconds(strategy), 4), num_measures(strategy)

    def _predict(self, strategy: Strategy) -> tuple[Refusal | None, Strategy]:
        """Return why a strategy will not fit, cheap reasons first, and the strategy.

        Samples are tiled where they would not fit otherwise and the configuration leaves that open.
        """
        kept = self._predictor.resident(strategy)
        resident, gradients = kept.resident, 0 if strategy.optimizer_in_backward else kept.trained_bytes
        if (least := self._with_allowance(resident.total + gradients)) > self._budget_bytes:
            held = "weights, optimizer state and gradients" if gradients else "weights and optimizer state"
            reason = f"{self._refusal(strategy, least).reason}, for {held} alone"
            return Refusal(strategy=_family(strategy), reason=reason), strategy
        if self._sample_bytes(strategy) > self._budget_bytes and self._subject.config.memory.tiled_samples is None:
            strategy = replace(strategy, tiled_samples=True)
        if (needed := self._sample_bytes(strategy)) > self._budget_bytes:
            reason = f"{self._refusal(strategy, needed).reason}, while samples are drawn"
            return Refusal(strategy=describe(strategy), reason=reason), strategy
        needed = self._with_allowance(self._predictor.train_bytes(strategy))
        return (self._refusal(strategy, needed) if needed > self._budget_bytes else None), strategy

    def _sample_bytes(self, strategy: Strategy) -> int:
        if not self._subject.config.prompts_drawn:
            return 0
        return self._with_allowance(self._predictor.sample(strategy).total)

    def _phases_of_training(self, strategy: Strategy) -> list[PhaseMemory]:
        phases = [_phase("train", self._predictor.traced(strategy))]
        if self._subject.config.prompts_drawn:
            host_bytes = self._predictor.resident(strategy).host_bytes
            phases.append(PhaseMemory(name="sample", parts=self._predictor.sample(strategy), host_bytes=host_bytes))
        return phases

    def _needed(self, phases: Sequence[PhaseMemory]) -> int:
        return self._with_allowance(max(phase.parts.total for phase in phases))

    def _with_allowance(self, num_bytes: int) -> int:
        return num_bytes + allowance_bytes(num_bytes, self._subject.card)

    def _refusal(self, strategy: Strategy, needed: int) -> Refusal:
        more = needed - self._budget_bytes
        reason = f"needs {_gib(needed)}, {_gib(more) if more >= GIB // 10 else _mib(more)} more than the budget"
        return Refusal(strategy=describe(strategy), reason=reason)

    def _plan(self, strategy: Strategy, phases: list[PhaseMemory], refused: list[Refusal]) -> Plan:
        peak = max(phases, key=lambda phase: phase.parts.total)
        notes = [] if peak.name == "train" else [f"the peak of the run is that of {peak.name}, not of train"]
        return MemoryPlan(
            device=self._subject.card.name,
            strategy=strategy,
            phases=tuple(phases),
            allowance_bytes=allowance_bytes(peak.parts.total, self._subject.card),
            budget_bytes=self._budget_bytes,
            seconds_per_step=self._predictor.seconds(strategy),
            refused=tuple(refused),
            notes=tuple(notes),
            seconds_to_plan=0.0,
        )

    def _too_small(self, kept: Sequence[Strategy], before: list[PhaseMemory]) -> BudgetError:
        """Return the error that names the smallest budget, that of the strategy with the most measures."""
        smallest = max(kept, key=num_measures)
        if self._subject.config.memory.tiled_samples is None and self._subject.config.prompts_drawn:
            smallest = replace(smallest, tiled_samples=True)
        phases = [*before, *self._phases_of_training(smallest)]
        peak = max(phases, key=lambda phase: phase.parts.total)
        return BudgetError(
            f"memory.budget: {_gib(self._budget_bytes)} is less than any strategy needs; the smallest budget that "
            f"would do is {_round_up(self._needed(phases))}: {describe(smallest)}; its peak is in the phase {peak.name}"
            f"{_ADVICE.get(peak.name, '')}"
        )


def _phase(name: str, traced: Traced) -> PhaseMemory:
    return PhaseMemory(name=name, parts=traced.peak, host_bytes=traced.host_bytes)


def _family(strategy: Strategy) -> str:
    """Return what a strategy and those with other placements of checkpoints are called together."""
    return f"{describe(replace(strategy, checkpointing='none')).replace('no checkpointing', 'any checkpointing')}"


def _mib(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / (1 << 20))} MiB"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _round_up(num_bytes: int) -> str:
    """Return a budget that is enough: the next tenth of a GiB."""
    return f"{math.ceil(num_bytes / GIB * 10) / 10:.1f}GiB"
