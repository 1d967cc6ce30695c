"""All stages, one after the other, and the JSON file that they fill."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_db import environment
from lowmem_db.bench import bandwidth, bits, candidates, capped, kernels, machine, memory, speed
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Clock, Row, Stage, run_stage, words_of
from lowmem_db.console import say, warn
from lowmem_db.storage.atomic import write_text

STAGES: tuple[Stage, ...] = (
    machine.STAGE,
    kernels.STAGE,
    bits.STAGE,
    memory.STAGE,
    speed.STAGE,
    candidates.STAGE,
    bandwidth.STAGE,
    capped.STAGE,
)
DEFAULT_MINUTES = 8.0
"""What the limits of the stages are made for; more minutes stretch them."""


def run_bench(
    setting: Setting,
    output: Path,
    *,
    minutes: float = DEFAULT_MINUTES,
    stages: Sequence[Stage] = STAGES,
    clock: Clock = Clock(),  # noqa: B008 -- it has no state
) -> dict[str, Any]:
    """Measure a machine and return the report, which stands in ``output`` as far as it is known at any moment.

    Args:
        setting: What is measured.
        output: The JSON file; replaced where it exists.
        minutes: A stage whose limit would end later is left out, and so are those behind it.
        stages: The stages.
        clock: Tells the seconds.

    Raises:
        StorageError: The file cannot be written.
    """
    started, stretch = clock.now(), max(1.0, minutes / DEFAULT_MINUTES)
    report: dict[str, Any] = {
        "card": machine.card_of(setting),
        "versions": {name: version for name, version in environment.versions().items() if version is not None},
        "tiny": setting.tiny,
        "quick": setting.quick,
        "stages": [],
        "dropped": [],
    }

    def write() -> None:
        write_text(output, json.dumps(report, indent=2) + "\n")

    write()
    lost: str | None = None
    for stage in stages:
        limit = stage.limit_seconds * stretch * (0.5 if setting.quick else 1.0)
        if report["dropped"] or clock.now() - started + limit > minutes * 60:
            report["dropped"].append(stage.name)
            continue
        say(f"bench: {stage.name}")
        found: Row = {}
        report["stages"].append(found)
        if lost is not None:
            found |= {"name": stage.name, "ok": False, "seconds": 0.0, stage.rows: [], "error": lost}
            continue
        run_stage(stage, setting, found, limit_seconds=limit, clock=clock, write=write)
        if "left_out" in found:
            say(f"bench: {stage.name}: no time for {', '.join(found['left_out'])}; give more --minutes")
        if not found["ok"]:
            warn(f"{stage.name}: {found['error']}")
            lost = _why_lost(setting, stage)
    if report["dropped"]:
        say(f"bench: {minutes:g} minutes are not enough for {', '.join(report['dropped'])}; give more --minutes")
    write()
    return report


def _why_lost(setting: Setting, stage: Stage) -> str | None:
    """Say why a card computes nothing more in this process: CUDA tells some faults again at every later call."""
    try:
        setting.synchronize()
    except RuntimeError as error:
        return f"skipped: the card does not answer since {stage.name} ({words_of(error)})"
    return None
