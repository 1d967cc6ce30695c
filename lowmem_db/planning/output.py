"""A plan as JSON, and as text on the screen."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from lowmem_db.config.strategy import describe, values_of
from lowmem_db.console import bar_of
from lowmem_db.environment import GIB
from lowmem_db.planning.plan import Plan
from lowmem_db.records import PhaseMemory, Refusal

_NUM_REFUSED = 8
_WIDTH = 14
_WORDS = {"class_images": "class images", "encode_images": "encoding", "train": "training", "sample": "samples"}
_ON_DISK = {"final": "final model", "records": "samples and records"}
_HEADINGS = ("weights", "states", "grads", "act.", "other", "host")


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values; sizes in bytes, times in seconds.

    ``tensor_bytes`` is what tensors take at the peak, ``reserved_bytes`` what the caching allocator takes for them, and
    ``process_bytes`` what ``nvidia-smi`` shows; ``peak_bytes`` is the last, which the budget is compared with.
    """
    return {
        "peak_bytes": plan.peak_bytes,
        "tensor_bytes": plan.tensor_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "process_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "allowance_bytes": plan.allowance_bytes,
        "host_peak_bytes": plan.host_peak_bytes,
        "num_processes": plan.config.distributed.num_processes,
        "sent_bytes_per_step": plan.sent_bytes,
        "received_bytes_per_step": plan.received_bytes,
        "device": plan.device,
        "phases": [
            {
                "name": phase.name,
                "peak_bytes": phase.parts.total,
                "parts": asdict(phase.parts),
                "host_bytes": phase.host_bytes,
            }
            for phase in plan.phases
        ],
        "strategy": values_of(plan.config),
        "refused": [asdict(refusal) for refusal in plan.refused],
        "notes": list(plan.notes),
        "seconds_per_step": plan.seconds_per_step,
        "seconds": dict(plan.seconds),
        "disk_bytes": dict(plan.disk_bytes),
        "seconds_to_plan": plan.seconds_to_plan,
    }


def show(plan: Plan, out: Console) -> None:
    """Print a plan: the strategy, a bar for each phase, and why faster strategies were refused."""
    out.print(f"{describe(plan.config)}", style="bold")
    out.print(
        f"peak {_gib(plan.peak_bytes)} of {_gib(plan.budget_bytes)} on {plan.device}, including "
        f"{_gib(plan.allowance_bytes)} for context, workspaces and fragmentation; "
        f"planned in {plan.seconds_to_plan:.1f} s",
    )
    out.print(_phases(plan, out.encoding))
    out.print(time_in_words(plan))
    out.print(disk_in_words(plan))
    for note in plan.notes:
        out.print(note)
    if plan.refused:
        out.print(_refused(plan.refused))
    if len(plan.refused) > _NUM_REFUSED:
        out.print(f"and {len(plan.refused) - _NUM_REFUSED} more; --json lists all")


def summary(plan: Plan) -> str:
    """Return a plan in one line, for the start of a run."""
    return (
        f"plan: {describe(plan.config)}; predicted peak {_gib(plan.peak_bytes)} of {_gib(plan.budget_bytes)} "
        f"(memory.budget); {len(plan.refused)} faster strategies refused, see plan.json"
    )


def time_in_words(plan: Plan) -> str:
    """Return the predicted time of a run in one line."""
    said = [f"{_WORDS[name]} {in_words(seconds)}" for name, seconds in plan.seconds.items() if seconds >= 1]
    pace = f"{plan.config.training.max_train_steps} steps of {plan.seconds_per_step:.2f} s"
    return f"time, predicted: {', '.join(said)} ({pace}); in all {in_words(sum(plan.seconds.values()))}, plus loading"


def disk_in_words(plan: Plan) -> str:
    """Return what a run takes on the disk in one line."""
    said = [f"{_ON_DISK.get(name, name)} {size / GIB:.1f} GiB" for name, size in plan.disk_bytes.items()]
    return f"disk, at most: {', '.join(said)}; in all {sum(plan.disk_bytes.values()) / GIB:.1f} GiB"


def in_words(seconds: float) -> str:
    """Return a time for people."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _phases(plan: Plan, encoding: str) -> Table:
    largest = max(phase.parts.total for phase in plan.phases)
    table = Table(box=None, collapse_padding=True, pad_edge=False)
    for heading in ("GiB", "peak", "", *_HEADINGS):
        table.add_column(heading, no_wrap=True)
    for phase in plan.phases:
        bar = bar_of(phase.parts.total / largest, _WIDTH, encoding)
        table.add_row(phase.name, _short(phase.parts.total), bar, *_sizes(phase))
    return table


def _sizes(phase: PhaseMemory) -> list[str]:
    return [_short(size) for size in (*asdict(phase.parts).values(), phase.host_bytes)]


def _refused(refused: tuple[Refusal, ...]) -> Table:
    table = Table("refused", "why", box=None)
    for refusal in refused[:_NUM_REFUSED]:
        table.add_row(refusal.strategy, refusal.reason)
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _short(num_bytes: int) -> str:
    """Return a size in GiB without the unit; a dash for nothing."""
    return "-" if num_bytes < GIB // 200 else f"{num_bytes / GIB:.2f}"
