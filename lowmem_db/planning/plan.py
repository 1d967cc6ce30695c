"""The plan of a run: the fastest strategy whose peak fits the budget, and why faster ones were refused."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import StrategyField, changed, describe, effort_of, open_paths
from lowmem_db.engine.fitting import check_fits
from lowmem_db.environment import GIB
from lowmem_db.errors import BudgetError, ConfigError
from lowmem_db.models.finding import model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.planning.allowance import allocator_bytes
from lowmem_db.planning.candidates import candidates, open_choices
from lowmem_db.planning.cards import Card
from lowmem_db.planning.disk import cache_bytes, checkpoint_bytes, final_bytes, record_bytes
from lowmem_db.planning.duration import seconds_of_phases
from lowmem_db.planning.exchange import in_words
from lowmem_db.planning.needs import Needs
from lowmem_db.planning.phases import TracedRun
from lowmem_db.planning.predictor import Predictor, Traces
from lowmem_db.planning.shared_predictor import SharedPredictor
from lowmem_db.planning.smallest import Smallest, find_smallest, given_fields, in_the_way, without
from lowmem_db.planning.target import Target
from lowmem_db.records import MemoryPlan, PhaseMemory, Refusal

Plan = MemoryPlan[Config]
_NO_LIMIT = 1 << 62


def plan(config: Config, target: Target, *, model: ModelFolder | None = None) -> Plan:
    """Plan a run.

    Args:
        config: The configuration; the planner fills in what it leaves open.
        target: The device and the budget.
        model: The model; its configuration files are enough. Default: the one named by ``model.base``.

    Raises:
        BudgetError: Nothing fits; the message names the smallest budget that would be enough.
        ConfigError: A rule refuses every strategy, or a field does not fit the model.
        ModelError: The model's configuration files cannot be found.
    """
    model = model or model_of(config, weights=False)
    check_fits(config, model)
    if config.distributed.sharding == "full" and config.distributed.num_processes == 1:
        raise ConfigError(
            "distributed.sharding: 'full' shares the model out between processes, and there is one; start two with "
            "torchrun --nproc_per_node 2 -m lowmem_db, plan for them with --num-processes 2, or set "
            "distributed.sharding=none"
        )
    run = TracedRun(config=config, model=model, card=target.card)
    try:
        return Planner(run).plan(target.budget_bytes, host_bytes=target.host_bytes, notes=target.notes)
    except BudgetError as error:
        raise BudgetError(f"{error}{''.join(f' ({note})' for note in target.notes)}") from error


class Planner:
    """Plans one configuration for any number of budgets; traces are reused.

    Args:
        run: The run to plan; its configuration may leave fields open.
        traces: Those of the same run for another card, or with other fields left open. Default: none yet.

    Raises:
        ConfigError: A rule refuses every strategy.
    """

    def __init__(self, run: TracedRun, traces: Traces | None = None) -> None:
        self._started = time.perf_counter()
        self.run = run
        self.traces = traces or Traces()
        kind = SharedPredictor if run.config.distributed.sharding == "full" else Predictor
        self.predictor = kind(run, open_choices(run.config, run.card), self.traces)
        self.needs = Needs(self.predictor)

    def candidates(self) -> tuple[list[Config], list[Refusal]]:
        """Return every strategy that can be chosen, and those that a rule refuses."""
        return candidates(self.run.config, self.run.card, self.predictor.block_names)

    def plan(self, budget_bytes: int, *, host_bytes: int | None = None, notes: Sequence[str] = ()) -> Plan:
        """Plan for a budget.

        Args:
            budget_bytes: Device memory that the run may use.
            host_bytes: Memory of the host that it may use beside a card. Default: not limited.
            notes: Remarks to put before those of the plan.

        Raises:
            BudgetError: Nothing fits.
        """
        found = self.find(budget_bytes, host_bytes=host_bytes)
        if found is None:
            raise BudgetError(_too_small(self, budget_bytes))
        seconds = round(time.perf_counter() - self._started, 2)
        self._started = time.perf_counter()
        return replace(found, notes=(*notes, *found.notes), seconds_to_plan=seconds)

    def find(self, budget_bytes: int, *, host_bytes: int | None = None) -> Plan | None:
        """Return the plan for a budget, or None if nothing fits.

        Raises:
            BudgetError: What fits the card does not fit the memory of its host.
        """
        return _Search(self, budget_bytes, host_bytes).run()

    def smallest(self) -> Smallest:
        """Find the strategy that needs the least memory."""
        kept, _ = self.candidates()
        prepared = [tiled for strategy in kept for tiled in self.with_tiled_preparation(strategy)]
        return find_smallest(
            self.needs, [tiled for strategy in prepared for tiled in self.with_tiled_samples(strategy)]
        )

    def preference(self, strategy: Config) -> tuple[object, ...]:
        """Return the sort key of strategies: weights that stay first, then exact ones, then speed, then effort."""
        return *_last_resorts(strategy, self.run.card), round(self.predictor.seconds(strategy), 4), effort_of(strategy)

    def with_tiled_preparation(self, strategy: Config) -> list[Config]:
        """Return a strategy, and also the same with tiles before training if that is open."""
        is_open = "memory.tiled_preparation" in open_paths(self.run.config)
        return [strategy, *([changed(strategy, {"memory.tiled_preparation": True})] if is_open else [])]

    def with_tiled_samples(self, strategy: Config) -> list[Config]:
        """Return a strategy, and also the same with tiled samples if that is open and samples are drawn."""
        is_open = "memory.tiled_samples" in open_paths(self.run.config) and bool(strategy.prompts_drawn)
        return [strategy, *([changed(strategy, {"memory.tiled_samples": True})] if is_open else [])]


class _Search:
    """The search for a strategy that fits one budget."""

    def __init__(self, planner: Planner, budget_bytes: int, host_bytes: int | None) -> None:
        self._planner = planner
        self._predictor = planner.predictor
        self._needs = planner.needs
        self._card = planner.run.card
        self._budget_bytes = budget_bytes
        self._host_bytes = _NO_LIMIT if host_bytes is None else host_bytes
        self._pinnable_bytes = _NO_LIMIT if host_bytes is None else environment.pinnable_host_bytes(host_bytes)
        self._least_on_host: int | None = None

    def run(self) -> Plan | None:
        kept, refused = self._planner.candidates()
        too_large: set[str] = set()
        for strategy in chain.from_iterable(map(self._sorted, _by_last_resort(kept, self._card))):
            family = _name_without_activations(strategy)
            if family in too_large:
                continue
            refusal, chosen = self._predict(strategy)
            if refusal is None:
                phases = self._needs.phases(chosen)
                needed, on_host = self._needs.of_phases(phases), self._needs.host_peak(chosen, phases)
                pinned = max(phase.pinned_bytes for phase in phases)
                if needed <= self._budget_bytes and on_host <= self._host_bytes and pinned <= self._pinnable_bytes:
                    return self._plan(chosen, phases, refused)
                if needed <= self._budget_bytes:
                    refusal = self._refusal_of_host(chosen, on_host, pinned)
                else:
                    refusal = self._refusal(describe(chosen), needed)
            elif refusal.strategy == family:
                too_large.add(family)
            refused.append(refusal)
        if self._least_on_host is not None:
            raise BudgetError(
                f"memory of the host: {gib(self._host_bytes)} are free, but what fits the card needs "
                f"{gib(self._least_on_host)} there, for models while they load and for what stays on the host; close "
                "other programs, raise the limit of the container, or set lora.enabled=true, which needs less"
                f"{self._note_of_pinned()}"
            )
        return None

    def _refusal_of_host(self, strategy: Config, needed: int, pinned: int) -> Refusal:
        self._least_on_host = min(needed, self._least_on_host or needed)
        reason = f"needs {gib(needed)} of the host's memory, of which {gib(self._host_bytes)} are free"
        if pinned > self._pinnable_bytes:
            reason = f"needs {gib(pinned)} of pinned memory{self._note_of_pinned()}"
        return Refusal(strategy=describe(strategy), reason=reason)

    def _note_of_streams(self, strategy: Config, phases: Sequence[PhaseMemory]) -> Iterator[str]:
        """Yield what streamed weights need beside the card."""
        if not strategy.memory.stream_weights:
            return
        crossing, pinned = self._predictor.crossing(strategy), max(phase.pinned_bytes for phase in phases)
        inward, outward = gib(crossing.forward + crossing.backward), gib(crossing.back)
        yield f"each step brings {inward} to the card and {outward} back; {gib(pinned)} of the host are pinned"

    def _note_of_pinned(self) -> str:
        is_less = self._pinnable_bytes < self._host_bytes
        return f"; Windows lets programs pin {gib(self._pinnable_bytes)} here" if is_less else ""

    def _sorted(self, strategies: Sequence[Config]) -> Iterator[Config]:
        """Yield strategies by speed, then by the least effort; nothing is traced before the first is wanted."""
        yield from sorted(
            strategies, key=lambda strategy: (round(self._predictor.seconds(strategy), 4), effort_of(strategy))
        )

    def _predict(self, strategy: Config) -> tuple[Refusal | None, Config]:
        """Return why a strategy does not fit, checking cheap reasons first, and the strategy.

        Samples, and pictures before training, are tiled where they would not fit otherwise and the configuration leaves
        that open.
        """
        needs, budget = self._needs, self._budget_bytes
        prepared = self._planner.with_tiled_preparation(strategy)
        strategy = next((each for each in prepared if needs.before_training(each) <= budget), prepared[-1])
        if (needed := needs.before_training(strategy)) > budget:
            return self._refusal(_name_without_activations(strategy), needed, ", before training"), strategy
        if (needed := needs.between_steps(strategy)) > budget:
            gradients = "" if strategy.memory.optimizer_in_backward else " and gradients"
            held = f"weights{',' if gradients else ' and'} optimizer state{gradients}"
            return self._refusal(_name_without_activations(strategy), needed, f", for {held} alone"), strategy
        if (kept := self._predictor.resident(strategy).pinned_bytes) > self._pinnable_bytes:
            return self._refusal_of_host(strategy, kept, kept), strategy
        if (needed := needs.training(strategy)) > budget:
            return self._refusal(describe(strategy), needed), strategy
        drawn = self._planner.with_tiled_samples(strategy)
        chosen = next((each for each in drawn if needs.samples(each) <= budget), None)  # tiles are traced if need be
        if chosen is None:
            return self._refusal(describe(drawn[-1]), needs.samples(drawn[-1]), ", while samples are drawn"), drawn[-1]
        return None, chosen

    def _refusal(self, strategy: str, needed: int, why: str = "") -> Refusal:
        more = needed - self._budget_bytes
        beyond = gib(more) if more >= GIB // 10 else f"{math.ceil(more / (1 << 20))} MiB"
        return Refusal(strategy=strategy, reason=f"needs {gib(needed)}, {beyond} more than the budget{why}")

    def _plan(self, strategy: Config, phases: list[PhaseMemory], refused: list[Refusal]) -> Plan:
        peak = max(phases, key=lambda phase: phase.parts.total)
        needed = self._needs.of_phases(phases)
        exchange = self._predictor.exchange(strategy)
        notes = [] if peak.name == "train" else [f"the peak of the run is in the phase {peak.name}, not in train"]
        notes += self._note_of_streams(strategy, phases)
        notes += [in_words(strategy, exchange)] if strategy.distributed.num_processes > 1 else []
        return MemoryPlan(
            device=self._card.name,
            config=strategy,
            phases=tuple(phases),
            allowance_bytes=needed - peak.parts.total,
            reserved_bytes=None if self._card.is_cpu else allocator_bytes(needed),
            budget_bytes=self._budget_bytes,
            seconds_per_step=self._predictor.seconds(strategy) + exchange.seconds,
            seconds=seconds_of_phases(self._predictor, strategy, exchange.seconds),
            sent_bytes=exchange.sent_bytes,
            received_bytes=exchange.received_bytes,
            disk_bytes=self._disk_bytes(strategy),
            refused=tuple(refused),
            notes=tuple(notes),
            seconds_to_plan=0.0,
            host_peak_bytes=self._needs.host_peak(strategy, phases),
        )

    def _disk_bytes(self, strategy: Config) -> dict[str, int]:
        model, trained = self._planner.run.model, self._predictor.resident(strategy).num_trained
        return {
            "cache": cache_bytes(strategy, model),
            "checkpoints": checkpoint_bytes(strategy, model, trained),
            "final": final_bytes(strategy, model, trained),
            "records": record_bytes(strategy),
        }


def _too_small(planner: Planner, budget_bytes: int) -> str:
    """Say which budget would be enough, and which fields of the configuration keep it from being smaller."""
    smallest = planner.smallest()
    message = (
        f"memory.budget: {gib(budget_bytes)} is less than any strategy needs; the smallest budget that is enough is "
        f"{smallest.describe()}"
    )
    config = planner.run.config
    if not (given := given_fields(config)):
        return message
    opened = Planner(replace(planner.run, config=without(config, given)), planner.traces)
    best = opened.smallest()
    if best.num_bytes >= smallest.num_bytes:
        return message
    fields = in_the_way(config, opened.needs, best)
    found = Planner(replace(planner.run, config=without(config, fields)), planner.traces).smallest()
    is_enough = ", which is within the budget" if found.num_bytes <= budget_bytes else ""
    return (
        f"{message}. The configuration sets {_listed(config, fields)}; without that, {found.budget} is enough"
        f"{is_enough}: {describe(found.strategy)}"
    )


def _listed(config: Config, fields: Iterable[StrategyField]) -> str:
    said = [f"{field.path}={str(field.of(config)).lower()}" for field in fields]
    return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


def _is_rounded(strategy: Config) -> bool:
    """Return whether a strategy rounds weights; it comes after all that do not."""
    return strategy.memory.weights == "bf16_stochastic" or strategy.lora.base_weights in {"int8", "nf4"}


def _last_resorts(strategy: Config, card: Card) -> tuple[bool, bool, bool]:
    """Return what a strategy does that others, whatever they cost, are preferred to.

    A step on the host is preferred to nothing but where few lanes may make it the faster one.
    """
    steps_on_host = strategy.memory.optimizer_step == "host" and not card.has_few_lanes
    return bool(strategy.memory.stream_weights), _is_rounded(strategy), steps_on_host


def _by_last_resort(strategies: Sequence[Config], card: Card) -> list[list[Config]]:
    """Return strategies in groups; a later one is for when nothing in those before it fits."""
    groups: dict[tuple[bool, bool, bool], list[Config]] = {}
    for strategy in strategies:
        groups.setdefault(_last_resorts(strategy, card), []).append(strategy)
    return [groups[key] for key in sorted(groups)]


def _name_without_activations(strategy: Config) -> str:
    """Return the common name of a strategy and those that differ only in activations."""
    alike: dict[str, object] = {"memory.checkpointing": "none"}
    activations = ("offload_checkpoints", "fused_layers", "channels_last", "tiled_preparation")
    alike |= dict.fromkeys((f"memory.{name}" for name in activations), False)
    return describe(changed(strategy, alike)).replace("no checkpointing", "any checkpointing")


def gib(num_bytes: int) -> str:
    """Return a size, rounded to a tenth of a GiB."""
    return f"{num_bytes / GIB:.1f} GiB"
