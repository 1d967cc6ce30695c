"""A stage of measurements, and what happens when one of them fails or takes too long."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lowmem_db import environment
from lowmem_db.bench.setting import Setting

Row = dict[str, Any]
Measurement = tuple[str, Callable[[], Row]]
"""A name, and what returns the figures that stand beside it."""
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A group of measurements.

    Attributes:
        name: Its name in the JSON.
        rows: What its measurements are called there.
        limit_seconds: No measurement is begun later than that.
        measurements: Makes them, one after the other.
    """

    name: str
    rows: str
    limit_seconds: float
    measurements: Callable[[Setting], Iterable[Measurement]]


@dataclass(frozen=True)
class Clock:
    """Seconds, as stages are told them; a test has its own."""

    now: Callable[[], float] = field(default=time.perf_counter)


def run_stage(
    stage: Stage, setting: Setting, found: Row, *, limit_seconds: float, clock: Clock, write: Callable[[], None]
) -> None:
    """Take the measurements of a stage; a failure is written down, and the next measurement comes.

    Args:
        stage: The stage.
        setting: What is measured.
        found: Its JSON, filled here; ``ok`` is whether nothing failed and something was measured.
        limit_seconds: No measurement is begun later than that.
        clock: Tells the seconds.
        write: Called as soon as something more is known.
    """
    started, rows, left_out = clock.now(), list[Row](), list[str]()
    found |= {"name": stage.name, "ok": True, "seconds": 0.0, stage.rows: rows}

    def note_seconds() -> None:
        found["seconds"] = round(clock.now() - started, 3)
        write()

    reason = None
    try:
        for name, measure in stage.measurements(setting):
            if clock.now() - started > limit_seconds:
                left_out.append(name)
                continue
            row, failure = _measured(name, measure)
            rows.append(row)
            reason = reason or failure
            note_seconds()
    except Exception as error:  # noqa: BLE001 -- whatever a stage fails of, the others are measured
        reason = reason or words_of(error)
    try:
        environment.release_memory(setting.device)
    except Exception as error:  # noqa: BLE001 -- a fault of the card is told again by every later call
        reason = reason or f"release of memory: {words_of(error)}"
    if left_out:
        found["left_out"] = left_out
    if not rows and reason is None:
        reason = f"the limit of {limit_seconds:.0f} s was over before anything was measured; give more --minutes"
    if reason is not None:
        found |= {"ok": False, "error": reason}
    note_seconds()


def _measured(name: str, measure: Callable[[], Row]) -> tuple[Row, str | None]:
    """Return the row of a measurement, and why it failed."""
    try:
        return {"name": name} | measure(), None
    except Exception as error:  # noqa: BLE001 -- whatever a measurement fails of, the others are taken
        return {"name": name, "error": words_of(error)}, f"{name}: {words_of(error)}"


def words_of(error: Exception) -> str:
    """Return the kind of an error and what it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]
