"""The suite `scaling` measures how time and peak memory grow with N, V, G and P, ours beside the plain way.

    run(SUITE, Options(suite="scaling"))                                  # this machine; ten minutes on two cores
    run(SUITE, Options(suite="scaling", peers=("N",), shapes=("V=128256,H=1024",)))        # one sweep, at other sizes

What is run at a size is in `points`. A row's result is checked in the run whose memory is counted, and only then timed.
The times mean something on a machine that does nothing else; a row that takes seconds is timed once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ... import charts
from ...charts import figure_of, save
from ..passes import PassSuite
from ..peers import PLAIN, SDCORE
from ..rows import PassReport, PassRow
from ..shapes import MIB
from ..tables import NONE, Table, why
from .points import LIMIT, Point, Way, job, judge, names, points, resident_bytes

MEANING = {
    "N": "rows of the output layer's loss",
    "V": "vocabulary of the output layer's loss",
    "G": "completions of one prompt",
    "P": "tokens of the prompt",
}
Sweep = dict[Point, list[PassRow]]  # in the order of sizes


def sweeps(report: PassReport) -> list[Sweep]:
    """Gathers the points that differ in one size only, smallest first."""
    by_fixed: dict[tuple[str, str], Sweep] = {}
    for point, rows in report.by_case().items():
        by_fixed.setdefault((point.sweep, point.fixed), {})[point] = rows
    return [dict(sorted(sweep.items(), key=lambda entry: entry[0].size)) for sweep in by_fixed.values()]


def curve(sweep: Sweep, name: str, value: Callable[[PassRow], float]) -> list[tuple[int, float]]:
    """Returns (size, value) of a contender wherever it was timed."""
    return [
        (point.size, value(row))
        for point, rows in sweep.items()
        for row in rows
        if row.contender == name and row.seconds
    ]


def seconds(row: PassRow) -> float:
    return row.median


def live_mib(row: PassRow) -> float:
    return math.nan if row.live_bytes is None else row.live_bytes / MIB


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Fits x of size^x by least squares over the larger half of the points; NaN for fewer than two."""
    half = points[-max(2, math.ceil(len(points) / 2)) :]
    if len(half) < 2 or not all(value > 0 for _, value in half):
        return math.nan
    logs = [(math.log(size), math.log(value)) for size, value in half]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def sweep_table(sweep: Sweep) -> Table:
    """Shows one line per size."""
    first = next(iter(sweep))
    plain, ours = names(first)
    times, peaks = (f"{name}, s" for name in (plain, ours, LIMIT)), (f"{name}, peak MiB" for name in (plain, ours))
    title = f"{first.sweep}, {MEANING[first.sweep]}; {first.fixed}: forward and backward"
    heads = (first.sweep, *times, f"{plain} / {ours}", f"{ours} / matmuls", *peaks, "gradients, MiB")
    table = Table(title, heads)
    for point, rows in sweep.items():
        by_name = {row.contender: row for row in rows}
        seconds = [by_name[name].median for name in (plain, ours, LIMIT)]
        gradients = max(row.gradient_bytes for row in rows) / MIB
        table.add(
            f"{point.size:,}",
            *map(_number, seconds),
            _number(seconds[0] / seconds[1], "×"),
            _number(seconds[1] / seconds[2], "×"),
            *(_number(live_mib(by_name[name])) for name in (plain, ours)),
            _number(gradients or math.nan),
        )
        table.notes += [
            f"{point.sweep}={point.size:,}, {row.contender}: {why(row.reason)}" for row in rows if row.reason
        ]
    return table


def _number(value: float, unit: str = "") -> str:
    if math.isnan(value):
        return NONE
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def overview(report: PassReport) -> Table:
    """Shows one line per sweep: how each contender grows, and how far the plain way came."""
    growths = ("time, plain", "time, sdcore", "time, matmuls", "peak, plain", "peak, sdcore")
    table = Table(
        "Growth: x where time or peak memory is about size^x, over the larger half of a sweep",
        ("varies", "fixed", *growths, "largest, plain", "largest, sdcore"),
        text_columns=2,
        notes=["Plain is plain torch with whole logits (N, V), and every completion with its prompt (G, P)."],
    )
    for sweep in sweeps(report):
        first = next(iter(sweep))
        plain, ours = names(first)
        times = [exponent(curve(sweep, name, seconds)) for name in (plain, ours, LIMIT)]
        peaks = [exponent(curve(sweep, name, live_mib)) for name in (plain, ours)]
        largest = [max((size for size, _ in curve(sweep, name, seconds)), default=None) for name in (plain, ours)]
        table.add(
            f"{first.sweep}, {MEANING[first.sweep]}",
            first.fixed,
            *(NONE if math.isnan(x) else f"{x:.2f}" for x in (*times, *peaks)),
            *(NONE if size is None else f"{size:,}" for size in largest),
        )
    return table


PLAIN_COLOUR, OURS_COLOUR = PLAIN.colour, SDCORE.colour
STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": PLAIN_COLOUR, "marker": "s", "markersize": 5, "linewidth": 1.8, "zorder": 3},
    "ours": {"color": OURS_COLOUR, "marker": "o", "markersize": 5, "linewidth": 2.2, "zorder": 4},
    "limit": {"color": "black", "linestyle": "--", "linewidth": 1.0, "zorder": 2},
    "too large": {"color": PLAIN_COLOUR, "marker": "s", "markersize": 6, "markerfacecolor": "white", "linestyle": ":"},
    "memory": {"color": "#c8443c", "linestyle": "-.", "linewidth": 1.0, "zorder": 1},
}
LABELS = {
    "plain": "plain: whole logits (N, V); every completion with its prompt (G, P)",
    "ours": "sdcore: fused loss (N, V); shared prompt (G, P)",
    "limit": "limit: the matrix products alone",
    "too large": "plain would need (estimate; not run)",
    "memory": "free memory",
}


def draw(report: PassReport, path: Path) -> None:
    """Draws time above and peak memory below, a column per sweep, of the first dtype that it was measured in."""
    columns: dict[str, Sweep] = {}
    for sweep in sweeps(report):
        columns.setdefault(next(iter(sweep)).sweep, sweep)
    panels = [partial(_draw_times, sweep=sweep) for sweep in columns.values()]
    panels += [partial(_draw_peaks, sweep=sweep, free=report.machine.get("free_bytes")) for sweep in columns.values()]
    title = f"How time and memory grow, {report.machine['name']}"
    figure = figure_of(panels, columns=len(columns), size=(3.5, 3.4), title=title, legend="below", legend_columns=3)
    figure.axes[0].set_ylabel("time, forward and backward")
    figure.axes[len(columns)].set_ylabel("peak memory beyond inputs and weights")
    save(figure, path)


def _draw_times(axes: Any, sweep: Sweep) -> None:
    first = next(iter(sweep))
    names_of = dict(zip(("plain", "ours", "limit"), (*names(first), LIMIT), strict=True))
    times = {style: curve(sweep, name, seconds) for style, name in names_of.items()}
    _draw_curves(axes, sweep, times, lambda time: f"{time:g} s", "takes {:.2g}× as long")
    axes.set_title(f"{first.sweep}: {MEANING[first.sweep]}\n{first.fixed}", fontsize=8)


def _draw_peaks(axes: Any, sweep: Sweep, free: int | None) -> None:
    first = next(iter(sweep))
    plain, ours = names(first)
    peaks = {"plain": curve(sweep, plain, live_mib), "ours": curve(sweep, ours, live_mib)}
    beyond = [
        (point.size, row.needed_bytes / MIB)
        for point, rows in sweep.items()
        for row in rows
        if row.contender == plain and not row.seconds and not math.isnan(row.needed_bytes)
    ]
    if beyond:
        measured = peaks["plain"][-1:]
        style = STYLES["too large"] | {"markevery": slice(len(measured), None)}
        charts.line(axes, *zip(*measured, *beyond, strict=True), label=LABELS["too large"], **style)
    if free is not None:
        axes.axhline(free / MIB, label=LABELS["memory"], **STYLES["memory"])
    _draw_curves(axes, sweep, peaks, _bytes, "holds {:.2g}× as much", base=4)
    axes.set_xlabel(first.sweep)


def _draw_curves(
    axes: Any,
    sweep: Sweep,
    curves: dict[str, list[tuple[int, float]]],
    written: Callable[[float], str],
    words: str,
    base: float = 10,
) -> None:
    """Draws lines over logarithmic axes, and says how far plain and ours are apart where both were run last."""
    for style, measured in curves.items():
        if measured:
            charts.line(axes, *zip(*measured, strict=True), label=LABELS[style], **STYLES[style])
    charts.log_scale(axes, y=base)
    charts.sizes_on_x(axes, [point.size for point in sweep])
    axes.yaxis.set_major_formatter(lambda value, _: written(value))
    plain, ours = dict(curves["plain"]), dict(curves["ours"])
    both = [size for size in plain if size in ours]
    if both:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.18)  # room for the words
        apart = words.format(plain[both[-1]] / ours[both[-1]])
        text = f"at {next(iter(sweep)).sweep}={charts.short(both[-1])} plain\n{apart}"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=8)


def _bytes(mib: float) -> str:
    return f"{mib:g} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"


SUITE = PassSuite(
    name="scaling",
    title="Benchmark of scaling",
    seconds=1.0,
    picture="Time and peak memory against N, V, G and P",
    case=Point,
    case_fields={name: name for name in ("sweep", "sizes", "dtype", "model")},
    row_fields={"values_error": "values_error", "needed_bytes": "needed_bytes"},
    named=str,
    cases=points,
    contenders=lambda point: [Way(name) for name in names(point)],
    setup=job,
    limits=lambda this: [(LIMIT, this.products)],
    judge=judge,
    resident_bytes=resident_bytes,
    needed_bytes=lambda this, way: this.needed[way.name],
    is_large=lambda point: point.is_large,
    limits_left_out=(LIMIT,),
    notes_free_memory=True,
    overviews=lambda report: [overview(report)],
    per_case=lambda report: [sweep_table(sweep) for sweep in sweeps(report)],
    draw=draw,
)
