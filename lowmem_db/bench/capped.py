"""The stage ``capped``: runs planned for smaller cards, with the allocator held to their memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch

from lowmem_db import environment
from lowmem_db.bench.machine import context_bytes
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage
from lowmem_db.bench.strategies import configuration
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import describe
from lowmem_db.environment import GIB
from lowmem_db.planning.measured import MeasuredMemory, measure_train
from lowmem_db.planning.phases import TracedRun
from lowmem_db.planning.plan import Planner

_SIZES_GIB = (4, 6, 8, 12, 16)
_NUM_STEPS = 2


def _measurements(setting: Setting) -> Iterator[Measurement]:
    config = configuration(setting, {})
    planner = Planner(TracedRun(config=config, model=setting.model, card=setting.card))
    measured: dict[str, MeasuredMemory] = {}  # without a card nothing is capped, and equal strategies need the same
    for size in _SIZES_GIB:
        yield f"{size} GiB", partial(_imitated, setting, planner, size * GIB, measured)


def _imitated(setting: Setting, planner: Planner, budget_bytes: int, measured: dict[str, MeasuredMemory]) -> Row:
    """Plan for a budget, and train in it.

    Raises:
        BudgetError: Nothing fits.
        OutOfMemoryError: The plan is wrong.
    """
    found: Row = {"budget_bytes": budget_bytes, "predicted_bytes": None, "allocated_bytes": None}
    if setting.is_cuda and budget_bytes > torch.cuda.get_device_properties(setting.device).total_memory:
        return found | {"skipped": "the card is smaller"}
    plan = planner.plan(budget_bytes)
    name = describe(plan.config)
    if setting.is_cuda or name not in measured:
        measured[name] = _train(setting, plan.config, budget_bytes)
    return found | {
        "strategy": name,
        "predicted_bytes": next(phase.parts.total for phase in plan.phases if phase.name == "train"),
        "allocated_bytes": measured[name].tensor_bytes,
        "reserved_bytes": measured[name].reserved_bytes,
        "is_capped": setting.is_cuda,
    }


def _train(setting: Setting, config: Config, budget_bytes: int) -> MeasuredMemory:
    cap = partial(held_to, setting, budget_bytes)
    return measure_train(config, setting.model, setting.device, num_steps=_NUM_STEPS, around_steps=cap)


def held_to(setting: Setting, num_bytes: int) -> AbstractContextManager[None]:
    """Hold the allocator of a card to what a card of so many bytes would leave it beside the context."""
    beside_context = num_bytes - context_bytes(setting) if setting.is_cuda else num_bytes
    return environment.held_to(setting.device, beside_context)


STAGE = Stage(name="capped", rows="cards", limit_seconds=60.0, measurements=_measurements)
