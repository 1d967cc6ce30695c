"""The planner's allowances and rates from reports; what no report measured keeps its estimate."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lowmem_db.planning.cards import Card, card_of, known_name, pcie_rate
from tools.cards.reports import Report, row, rows

_DOCSTRING = '''\
"""What cards measured, for the planner: ``python -m tools.cards`` writes it from ``benchmarks/results/cards``.

{said}
"""

'''
_MIB = 1 << 20
_TECHNIQUES = ("fused_layers", "channels_last")
"""Candidates of the bench that the planner chooses by what they gained."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Figures of the planner.

    Attributes:
        num_cards: Reports they come from.
        cuda_context: Bytes of the CUDA context and the kernels loaded into it.
        cuda_workspaces: Bytes that libraries allocate and no trace sees.
        fragmentation: Bytes that the allocator reserves beyond tensors, as a share of them.
        share_of_bandwidth: Bandwidth of a copy on the card, as a share of the public figure.
        share_of_pcie: The same for a copy from the host.
        ratios: By card and field: seconds of a step with a technique over those without.
        seconds: By card: measured seconds of a step over predicted ones.
    """

    num_cards: int = 0
    cuda_context: int = 450 * _MIB
    cuda_workspaces: int = 150 * _MIB
    fragmentation: float = 0.05
    share_of_bandwidth: float = 0.75
    share_of_pcie: float = 0.8
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def calibrated(reports: Sequence[Report]) -> Calibration:
    """Return the figures: the largest allowance that a card needed, the median of rates."""
    estimate = Calibration()

    def found(values: Iterable[float], choose: Callable[[list[float]], float], otherwise: float) -> float:
        return choose(known) if (known := list(values)) else otherwise

    memory = [each for report in reports for each in rows(report, "memory") if each.get("reserved_bytes")]
    context = (row(report, "environment", "context").get("context_bytes") for report in reports)
    workspaces = (each["allocated_bytes"] - each["predicted_bytes"] for each in memory)
    gaps = ((each["reserved_bytes"] - each["allocated_bytes"]) / each["allocated_bytes"] for each in memory)
    return Calibration(
        num_cards=len(reports),
        cuda_context=_in_mib(found(filter(None, context), max, estimate.cuda_context)),
        cuda_workspaces=_in_mib(max(0.0, found(workspaces, max, estimate.cuda_workspaces))),
        fragmentation=round(found(gaps, max, estimate.fragmentation) + 0.0049, 2),
        share_of_bandwidth=round(found(_bandwidths(reports), statistics.median, estimate.share_of_bandwidth), 3),
        share_of_pcie=round(found(_pcie(reports), statistics.median, estimate.share_of_pcie), 3),
        ratios=_ratios(reports),
        seconds=dict(_seconds(reports)),
    )


def _in_mib(num_bytes: float) -> int:
    """Return bytes rounded up to whole MiB."""
    return -int(-num_bytes // _MIB) * _MIB


def _card(report: Report) -> Card:
    card = report["card"]
    major, minor = map(int, card["capability"].split("."))
    return card_of(card["name"], total_bytes=card["memory_bytes"], capability=(major, minor))


def _bandwidths(reports: Sequence[Report]) -> Iterator[float]:
    for report in reports:
        if rate := row(report, "bandwidth", "copy").get("gb_per_second"):
            yield rate / _card(report).bandwidth


def _pcie(reports: Sequence[Report]) -> Iterator[float]:
    for report in reports:
        if rate := row(report, "bandwidth", "host_to_device").get("gb_per_second"):
            yield rate * 1e9 / pcie_rate(_card(report))


def _ratios(reports: Sequence[Report]) -> dict[str, dict[str, float]]:
    """Return the medians of what the reports of a card say of each technique."""
    found: dict[str, dict[str, list[float]]] = {}
    for report in reports:
        of_card = found.setdefault(known_name(report["card"]["name"]), {})
        for name in _TECHNIQUES:
            if ratio := row(report, "candidates", name).get("ratio"):
                of_card.setdefault(f"memory.{name}", []).append(ratio)
    medians = {
        card: {field: round(statistics.median(ratios), 3) for field, ratios in of_card.items()}
        for card, of_card in found.items()
    }
    return {card: of_card for card, of_card in medians.items() if of_card}


def _seconds(reports: Sequence[Report]) -> Iterator[tuple[str, float]]:
    for report in reports:
        known = [each for each in rows(report, "speed") if each.get("predicted_seconds_per_step")]
        ratios = [each["seconds_per_step"] / each["predicted_seconds_per_step"] for each in known]
        if ratios:
            yield known_name(report["card"]["name"]), round(statistics.median(ratios), 3)


def render_module(found: Calibration) -> str:
    """Return the text of ``lowmem_db/planning/calibration.py``."""
    cards = "one card" if found.num_cards == 1 else f"{found.num_cards} cards"
    said = f"Measured on {cards}." if found.num_cards else "No card has been measured yet: these are estimates."
    lines = [
        f"NUM_CARDS = {found.num_cards}",
        f"CUDA_CONTEXT = {found.cuda_context}  # bytes: the context and the kernels loaded into it",
        f"CUDA_WORKSPACES = {found.cuda_workspaces}  "
        "# bytes: of cuBLAS (32 MiB), cuDNN, and the backward pass of deterministic attention",
        f"FRAGMENTATION = {found.fragmentation}  "
        "# of the peak: gaps in the blocks of the caching allocator, with expandable segments",
        f"SHARE_OF_BANDWIDTH = {found.share_of_bandwidth}  # of the public figure",
        f"SHARE_OF_PCIE = {found.share_of_pcie}  # of the public figure",
        f"RATIOS: dict[str, dict[str, float]] = {_nested(found.ratios)}  "
        "# by card and field: seconds of a step with a technique over those without",
        f"SECONDS: dict[str, float] = {_literal(found.seconds)}  "
        "# by card: measured seconds of a step over predicted ones",
    ]
    return _DOCSTRING.format(said=said) + "\n".join(lines) + "\n"


def _nested(ratios: dict[str, dict[str, float]]) -> str:
    return "{" + ", ".join(f'"{card}": {_literal(of_card)}' for card, of_card in ratios.items()) + "}"


def _literal(seconds: dict[str, float]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in seconds.items()) + "}"
