"""A plan as JSON, and as text on the screen."""

from dataclasses import asdict
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowmem_db.config.strategy import describe, values_of
from lowmem_db.environment import GIB
from lowmem_db.planning.plan import Plan
from lowmem_db.records import PhaseMemory, Refusal

_NUM_REFUSED = 8
_WIDTH = 14
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
        "seconds_to_plan": plan.seconds_to_plan,
    }


def show(plan: Plan, out: Console) -> None:
    """Print a plan: the strategy, a bar for each phase, and why faster strategies were refused."""
    out.print(f"{describe(plan.config)}", markup=False, style="bold")
    out.print(
        f"peak {_gib(plan.peak_bytes)} of {_gib(plan.budget_bytes)} on {plan.device}, including "
        f"{_gib(plan.allowance_bytes)} for context, workspaces and fragmentation; "
        f"predicted {plan.seconds_per_step:.2f} s/step; planned in {plan.seconds_to_plan:.1f} s",
        markup=False,
    )
    out.print(_phases(plan))
    for note in plan.notes:
        out.print(note, markup=False)
    if plan.refused:
        out.print(_refused(plan.refused))
    if len(plan.refused) > _NUM_REFUSED:
        out.print(f"and {len(plan.refused) - _NUM_REFUSED} more; --json lists all", markup=False)


def summary(plan: Plan) -> str:
    """Return a plan in one line, for the start of a run."""
    return (
        f"plan: {describe(plan.config)}; predicted peak {_gib(plan.peak_bytes)} of {_gib(plan.budget_bytes)} "
        f"(memory.budget); {len(plan.refused)} faster strategies refused, see plan.json"
    )


def _phases(plan: Plan) -> Table:
    largest = max(phase.parts.total for phase in plan.phases)
    table = Table(box=None, collapse_padding=True, pad_edge=False)
    for heading in ("GiB", "peak", "", *_HEADINGS):
        table.add_column(heading, no_wrap=True)
    for phase in plan.phases:
        bar = Bar(largest, 0, phase.parts.total, width=_WIDTH)
        table.add_row(phase.name, _short(phase.parts.total), bar, *_sizes(phase))
    return table


def _sizes(phase: PhaseMemory) -> list[str]:
    return [_short(size) for size in (*asdict(phase.parts).values(), phase.host_bytes)]


def _refused(refused: tuple[Refusal, ...]) -> Table:
    table = Table("refused", "why", box=None)
    for refusal in refused[:_NUM_REFUSED]:
        table.add_row(escape(refusal.strategy), escape(refusal.reason))
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _short(num_bytes: int) -> str:
    """Return a size in GiB without the unit; a dash for nothing."""
    return "-" if num_bytes < GIB // 200 else f"{num_bytes / GIB:.2f}"
