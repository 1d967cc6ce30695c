"""A report of ``bench`` for people: a Markdown table, and what of it can be shared."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lowmem_db.environment import GIB

_NOT_SHARED = {"reason"}  # may hold paths
_NOT_IN_TABLE = {"name", "error", "skipped", "reason"}


def table(report: Mapping[str, Any]) -> str:
    """Return a report as a Markdown table, a line for each measurement."""
    card, versions = report["card"], report["versions"]
    driver = f", driver {card['driver']}" if card["driver"] else ""
    lines = [
        f"{card['name']}{driver}, torch {versions['torch']}, lowmem-db bench"
        + "".join(f" --{flag}" for flag in ("tiny", "quick") if report[flag]),
        "",
        "| stage | what | ok | found |",
        "|---|---|---|---|",
    ]
    for stage in report["stages"]:
        lines += [_line(cells) for cells in _rows(stage)]
    lines += [_line((name, "", "-", "left out: more --minutes are needed")) for name in report["dropped"]]
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _rows(stage: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    rows = next(value for value in stage.values() if isinstance(value, list))
    yield stage["name"], "", _yes(stage["ok"]), stage.get("error", "") or f"{stage['seconds']:.1f} s"
    for row in rows:
        yield "", str(row["name"]), _yes("error" not in row), row.get("error") or _figures(row)
    if "left_out" in stage:
        yield "", "left out", "-", ", ".join(stage["left_out"])


def _figures(row: Mapping[str, Any]) -> str:
    said = [f"{_heading(key)} {_value(key, value)}" for key, value in row.items() if key not in _NOT_IN_TABLE]
    return ", ".join([*said, *([row["skipped"]] if "skipped" in row else [])])


def _heading(key: str) -> str:
    return key.removesuffix("_bytes").replace("gb_per_second", "GB/s").replace("_", " ")


def _value(key: str, value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return _yes(value)
    if key.endswith("_bytes"):
        return f"{value / GIB:.3f} GiB"
    if isinstance(value, float):
        return f"{value:.3g}" + (" s" if "seconds" in key else "")
    return str(value)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def shareable(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a report can be shared: card, driver, versions, names of measurements and numbers.

    Of a failure only its kind stays: a message may hold a path, and a path the name of a user.
    """
    return {key: _shareable(key, value) for key, value in report.items()}


def _shareable(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _shareable(name, each) for name, each in value.items() if name not in _NOT_SHARED}
    if isinstance(value, list):
        return [_shareable(key, each) for each in value]
    if key == "error":
        return "; ".join(re.findall(r"\b[A-Z]\w*(?=: )", value)[:1]) or "failed"
    return value


def file_name(report: Mapping[str, Any]) -> str:
    """Return what the file to be shared is called, after the card."""
    return re.sub(r"[^a-z0-9]+", "-", report["card"]["name"].lower()).strip("-") + "-shared.json"
