"""The stage ``memory``: what the planner predicts of a training step, beside what the step needed."""

from collections.abc import Iterator
from functools import partial

from lowmem_db import environment
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage
from lowmem_db.bench.strategies import Strategy, strategies
from lowmem_db.planning.allowance import allowance_bytes, reserved_bytes
from lowmem_db.planning.measured import measure_train
from lowmem_db.planning.phases import Traced, TracedRun, trace_train

_NUM_STEPS = 2


def _measurements(setting: Setting) -> Iterator[Measurement]:
    for each in strategies(setting):
        yield each.name, partial(_measured, setting, each)


def _measured(setting: Setting, strategy: Strategy) -> Row:
    """Predict, and where that fits, do it."""
    traced = _traced(setting, strategy)
    predicted, attentions = traced.peak.total, traced.costs.attentions
    unmeasured: Row = {"allocated_bytes": None, "reserved_bytes": None, "process_bytes": None}
    needed_bytes = predicted + allowance_bytes(predicted, setting.card, attentions)
    found: Row = {
        "predicted_bytes": predicted,
        "predicted_reserved_bytes": reserved_bytes(predicted, setting.card, attentions),
        "predicted_process_bytes": needed_bytes,
    }
    environment.release_memory(setting.device)
    free = environment.free_bytes(setting.device)
    if free is not None and needed_bytes > free:
        return found | unmeasured | {"skipped": "needs more memory than is free"}
    needed = measure_train(strategy.config, strategy.model, setting.device, num_steps=_NUM_STEPS)
    return found | {
        "allocated_bytes": needed.tensor_bytes,
        "reserved_bytes": needed.reserved_bytes,
        "process_bytes": needed.process_bytes,
    }


def predicted_bytes(setting: Setting, strategy: Strategy) -> int:
    """Return the bytes of tensors that the planner predicts for the peak of training."""
    return _traced(setting, strategy).peak.total


def _traced(setting: Setting, strategy: Strategy) -> Traced:
    return trace_train(TracedRun(config=strategy.config, model=strategy.model, card=setting.card))


STAGE = Stage(name="memory", rows="strategies", limit_seconds=150.0, measurements=_measurements)
