"""The stage ``speed``: our steps beside a plain loop of diffusers in the same process, and how busy the card is."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lowmem_db import environment
from lowmem_db.bench.memory import predicted_bytes
from lowmem_db.bench.plain_loop import Optimizer, PlainLoop, adamw, bitsandbytes_adamw
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage
from lowmem_db.bench.steps import Steps, seconds_in_turn
from lowmem_db.bench.strategies import FP32, TECHNIQUES, Fields, Strategy, strategy
from lowmem_db.planning.cards import seconds_per_step
from lowmem_db.planning.phases import TracedRun, trace_train

_CROSSINGS = ("Memcpy HtoD", "Memcpy DtoH")
_UNMEASURED: Row = {"seconds_per_step": None, "plain_seconds_per_step": None, "ratio": None}


def _measurements(setting: Setting) -> Iterator[Measurement]:
    autocast = {
        "training.mixed_precision": "no" if not setting.is_cuda else "bf16" if setting.card.has_bf16 else "fp16"
    }
    yield "adamw", partial(_compared, setting, FP32 | autocast, lambda: adamw(setting))
    if setting.is_cuda and not environment.is_installed("bitsandbytes"):
        yield "adamw8bit", lambda: _UNMEASURED | {"skipped": "bitsandbytes is not installed"}
    elif setting.is_cuda:
        yield "adamw8bit", partial(_compared, setting, TECHNIQUES["in_backward"], bitsandbytes_adamw)
    else:
        yield "adamw8bit", lambda: _UNMEASURED | {"skipped": "bitsandbytes is measured on CUDA devices alone"}


def _compared(setting: Setting, fields: Fields, find_optimizer: Callable[[], Optimizer]) -> Row:
    """Time both loops in turn, both without checkpoints where that fits, else both with them."""
    make_optimizer = find_optimizer()
    environment.release_memory(setting.device)
    checkpointing = not _both_fit(setting, fields)
    ours = strategy(setting, "ours", fields | {"memory.checkpointing": "segments" if checkpointing else "none"})
    loops = {
        "ours": Steps(ours, setting.device),
        "plain": PlainLoop(ours, setting, make_optimizer, checkpointing=checkpointing),
    }
    seconds = seconds_in_turn(loops, setting)
    return {
        "checkpointing": checkpointing,
        "predicted_seconds_per_step": _predicted_seconds(setting, ours) if setting.is_cuda else None,
        "seconds_per_step": seconds["ours"],
        "plain_seconds_per_step": seconds["plain"],
        "ratio": seconds["ours"] / seconds["plain"],
        "busy_share": busy_share(loops["ours"], setting),
        "plain_busy_share": busy_share(loops["plain"], setting),
    }


def _predicted_seconds(setting: Setting, strategy: Strategy) -> float:
    """Return what the public figures of the card say, without what was measured on others of its name."""
    costs = trace_train(TracedRun(config=strategy.config, model=strategy.model, card=setting.card)).costs
    return seconds_per_step(costs, replace(setting.card, name="one that is not calibrated"))


def _both_fit(setting: Setting, fields: Fields) -> bool:
    free = environment.free_bytes(setting.device)
    needed = predicted_bytes(setting, strategy(setting, "plain", FP32)) + predicted_bytes(
        setting, strategy(setting, "ours", fields)
    )
    return free is None or needed < free


def busy_share(step: Callable[[], object], setting: Setting) -> float | None:
    """Return the share of a step's time in which the card computes; None where there is no card.

    Kernels that run side by side on two streams count once, and copies between host and card do not count.
    """
    if not setting.is_cuda:
        return None
    setting.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        started = time.perf_counter()
        step()
        setting.synchronize()
        seconds = time.perf_counter() - started
    return min(1.0, covered(_computing(profiled.events() or ())) * 1e-6 / seconds)


def _computing(events: Iterable[Any]) -> Iterator[tuple[float, float]]:
    """Yield when kernels began and ended, in microseconds."""
    for event in events:
        is_label = getattr(event, "is_user_annotation", False)  # of a range, with the gaps in it
        if event.device_type == DeviceType.CUDA and not is_label and not event.name.startswith(_CROSSINGS):
            yield event.time_range.start, event.time_range.end


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


STAGE = Stage(name="speed", rows="comparisons", limit_seconds=70.0, measurements=_measurements)
