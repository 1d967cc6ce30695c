"""Charts as SVG: a few kilobytes each, without script, in the colours of the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

MAX_POINTS = 400
_WIDTH, _HEIGHT = 640.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 24.0, 12.0, 30.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: What the legend calls it.
        points: Pairs of step and value; values that are not finite are gaps.
        is_raw: Drawn thin and pale, and not named in the legend.
        colour: Number of its colour in the style sheet, from 1.
    """

    label: str
    points: Sequence[Point]
    is_raw: bool = False
    colour: int = 1


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the exponential moving average over about a twentieth of the points, corrected for its start."""
    decay = 1.0 - 1.0 / max(1.0, len(points) / 20)
    total, weight, result = 0.0, 0.0, []
    for step, value in points:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
            result.append((step, total / weight))
    return result


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most :data:`MAX_POINTS` points: of each interval the lowest and the highest, so that peaks stay."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = [point for point in points[start : start + size] if math.isfinite(point[1])]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])} if part else ())
    return kept


def line_chart(title: str, curves: Sequence[Curve], *, unit: str = "") -> Markup:
    """Return a chart of values over steps; empty if no curve has a finite value.

    Args:
        title: Read out by screen readers.
        curves: The lines; all share one axis.
        unit: Unit of the values.
    """
    drawn = [(curve, [p for p in thinned(curve.points) if math.isfinite(p[1])]) for curve in curves]
    everything = [point for _, points in drawn for point in points]
    if not everything:
        return Markup("")
    x_ticks = _ticks(min(x for x, _ in everything), max(x for x, _ in everything), whole=True)
    y_ticks = _ticks(min(y for _, y in everything), max(y for _, y in everything))
    x_of = _scale(min(x for x, _ in everything), max(x for x, _ in everything), _LEFT, _WIDTH - _RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid_line(y_of(value), f"{value:.4g}") for value in y_ticks]
    parts += [_x_label(x_of(value), f"{value:g}") for value in x_ticks]
    for curve, points in drawn:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        kind = "raw" if curve.is_raw else "line"
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle class="dot c{curve.colour}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>')
        parts.append(f'<polyline class="{kind} c{curve.colour}" points="{path}"/>')
    legend = Markup(" ").join(
        Markup('<span class="key c{}">{}</span>').format(curve.colour, curve.label)
        for curve, points in drawn
        if points and curve.label and not curve.is_raw
    )
    label = escape(f"{title}{f', {unit}' if unit else ''}, over training steps")
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)}{f" ({escape(unit)})" if unit else ""} {legend}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def bar_chart(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, unit: str) -> Markup:
    """Return horizontal stacked bars.

    Args:
        title: Read out by screen readers.
        rows: Label of each bar, and its parts: label and value. Parts of one label have one colour.
        unit: Unit of the values.
    """
    labels = list(dict.fromkeys(label for _, parts in rows for label, value in parts if value > 0))
    largest = max((sum(value for _, value in parts) for _, parts in rows), default=0.0)
    if largest <= 0:
        return Markup("")
    left, height, row_height = 118, 20, 30
    scale = (_WIDTH - left - 90) / largest
    drawn = []
    for number, (name, parts) in enumerate(rows):
        top, x = number * row_height + 4, float(left)
        drawn.append(f'<text class="label" x="{left - 8}" y="{top + 15}" text-anchor="end">{escape(name)}</text>')
        for label, value in parts:
            if value > 0:
                text = escape(f"{name}, {label}: {value:.2f} {unit}")
                colour = labels.index(label) + 1
                drawn.append(
                    f'<rect class="bar c{colour}" x="{x:.1f}" y="{top}" width="{value * scale:.1f}" height="{height}">'
                    f"<title>{text}</title></rect>"
                )
                x += value * scale
        total = sum(value for _, value in parts)
        drawn.append(f'<text class="label" x="{x + 6:.1f}" y="{top + 15}">{total:.2f} {escape(unit)}</text>')
    legend = Markup(" ").join(
        Markup('<span class="key c{}">{}</span>').format(index + 1, label) for index, label in enumerate(labels)
    )
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)} {legend}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH:g} {len(rows) * row_height + 4}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawn)}</svg></figure>"
    )


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return three to seven round numbers around a range."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    if whole:
        step = max(1.0, float(round(step)))
        first = math.ceil(low / step)
        return [first * step + index * step for index in range(int((high - first * step) / step) + 1)]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    factor = (end - start) / ((high - low) or 1.0)
    return lambda value: start + (value - low) * factor


def _grid_line(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="label" x="{_LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _x_label(x: float, label: str) -> str:
    return f'<text class="label" x="{x:.1f}" y="{_HEIGHT - 10:g}" text-anchor="middle">{label}</text>'
