"""A chart as inline SVG: lines, the range of what was averaged, ticks, and the values where the pointer rests.

Drawn here rather than by matplotlib, so that a page needs no extra, its text is text, and its colours are the page's:
the shapes carry classes (`line-0`, `band`, `grid`), which the page's style sheet colours in light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final

from .charts import AXIS_TITLES, Axis, Chart, Point, is_smooth, reduced, shown, smoothed

WIDTH: Final = 380
HEIGHT: Final = 190
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 10, 34
# From so many points on a line is drawn smoothed, over the points themselves.
SMOOTH_FROM: Final = 40
SMOOTH_SHARE: Final = 0.08
# Places at which the pointer shows the values.
PLACES: Final = 30
LINES: Final = 8  # classes line-0 ... line-7, then again


def draw(chart: Chart, axis: Axis) -> str:
    """The SVG of a chart over one of the axes that its series have."""
    lines = [reduced(one, axis) for one in chart.series]
    xs = [x for one in chart.series for x in one.x[axis]]
    low, high = _range([value for line in lines for point in line for value in (point.least, point.most)], chart.unit)
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    y_ticks = ticks(low, high, 4)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x_of(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in y_ticks:
        y = y_of(value)
        parts.append(f'<path class="{"zero" if value == 0 else "grid"}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        label = escape(_tick(value, y_ticks, chart.unit))
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    x_ticks = [value for value in ticks(left, right, 5) if left <= value <= right and value == int(value)]
    for value in x_ticks or [left]:
        label = escape(_short(value))
        parts.append(
            f'<text class="tick" x="{x_of(value):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{label}</text>'
        )
    title = escape(AXIS_TITLES[axis])
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{title}</text>')
    # The first series on top: it is the one that the chart is about.
    for i, line in reversed(list(enumerate(lines))):
        parts += _line(line, i % LINES, x_of, y_of, alone=len(lines) == 1)
    parts += _places(chart, lines, x_of)
    names = ", ".join(one.label for one in chart.series)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}: {escape(names)}">'
        + "".join(parts)
        + "</svg>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers that cover [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def _range(values: Sequence[float], unit: str) -> tuple[float, float]:
    low, high = min(values), max(values)
    if unit == "share" and low >= 0 and high <= 1 and high > 0.5:
        return 0.0, 1.0
    # From 0 on where that does not squeeze what there is to see.
    if low >= 0 and (unit == "share" or low < 0.6 * high):
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 1.0
        return (low - room if low else 0.0), high + room
    return low, high


def _line(points: Sequence[Point], number: int, x_of, y_of, *, alone: bool) -> list[str]:  # type: ignore[no-untyped-def]
    name = f"line-{number}"
    if len(points) == 1:
        return [f'<circle class="dot {name}" cx="{x_of(points[0].x):.1f}" cy="{y_of(points[0].y):.1f}" r="3"/>']
    xs = [x_of(point.x) for point in points]
    found = []
    if any(point.least != point.most for point in points):
        upper = [f"{x:.1f} {y_of(point.most):.1f}" for x, point in zip(xs, points, strict=True)]
        lower = [f"{x:.1f} {y_of(point.least):.1f}" for x, point in zip(xs, points, strict=True)]
        found.append(f'<path class="band {name}" d="M{"L".join(upper)}L{"L".join(reversed(lower))}Z"/>')
    values = [point.y for point in points]
    if len(points) >= SMOOTH_FROM and not is_smooth(values):
        if alone or not found:  # several bands are enough without the lines inside them
            found.append(f'<path class="raw {name}" d="{_path(xs, [y_of(value) for value in values])}"/>')
        values = smoothed(values, over=max(3, int(len(points) * SMOOTH_SHARE)))
    found.append(f'<path class="line {name}" d="{_path(xs, [y_of(value) for value in values])}"/>')
    if len(points) <= 12:
        found += [
            f'<circle class="dot {name}" cx="{x:.1f}" cy="{y_of(value):.1f}" r="2"/>'
            for x, value in zip(xs, values, strict=True)
        ]
    return found


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def _places(chart: Chart, lines: Sequence[Sequence[Point]], x_of) -> list[str]:  # type: ignore[no-untyped-def]
    """Invisible columns with the values as their title: what a browser shows without a script."""
    longest = max(lines, key=len)
    chosen = longest[:: math.ceil(len(longest) / PLACES)]
    edges = [x_of(point.x) for point in chosen]
    found = []
    for i, point in enumerate(chosen):
        start = LEFT if i == 0 else (edges[i - 1] + edges[i]) / 2
        end = WIDTH - RIGHT if i == len(edges) - 1 else (edges[i] + edges[i + 1]) / 2
        values = [
            f"{one.label}: {shown(min(line, key=lambda other: abs(other.x - point.x)).y, chart.unit)}"
            for one, line in zip(chart.series, lines, strict=True)
        ]
        title = escape("\n".join([f"{shown(round(point.x))}", *values]))
        found.append(
            f'<rect class="place" x="{start:.1f}" y="{TOP}" width="{max(0.0, end - start):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{title}</title></rect>'
        )
    return found


def _tick(value: float, all_ticks: Sequence[float], unit: str) -> str:
    if unit == "share":
        value *= 100
        return f"{value:.0f} %" if value == round(value, 6) // 1 else f"{value:g} %"
    if max(abs(tick) for tick in all_ticks) >= 10_000:
        return _short(value)
    return f"{value:g}"


def _short(value: float) -> str:
    """12k for 12000."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if size == 1e3 else 1):
            return f"{value / size:g}{name}"
    return f"{value:g}"


__all__ = ["draw", "ticks"]
