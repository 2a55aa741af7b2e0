"""The picture of the suite `scaling`: time above, peak memory below, a column per sweep, both axes logarithmic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .peers import PLAIN, SDCORE
from .plot import COLOURS, plt
from .scaling import MEANING, ScalingReport, Sweep, curve, live_mib, seconds, sweeps
from .scaling_cases import LIMIT, Point, names
from .tables import MIB

PLAIN_COLOUR, OURS_COLOUR = COLOURS[PLAIN.name], COLOURS[SDCORE.name]
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


def save_plot(report: ScalingReport, path: Path) -> list[Path]:
    """Of the first dtype that a sweep was measured in."""
    columns: dict[str, Sweep] = {}
    for sweep in sweeps(report):
        columns.setdefault(next(iter(sweep)).sweep, sweep)
    figure, axes = plt.subplots(2, len(columns), figsize=(1.0 + 3.4 * len(columns), 7.2), squeeze=False, sharex="col")
    free = report.machine.get("free_bytes")
    for (upper, lower), (letter, sweep) in zip(axes.T, columns.items(), strict=True):
        first = next(iter(sweep))
        _times(upper, sweep)
        _peaks(lower, sweep, free)
        upper.set_title(f"{letter}: {MEANING[letter]}\n{first.fixed}", fontsize=9)
        lower.set_xlabel(letter)
        for axis in (upper, lower):
            _logarithmic(axis, [point.size for point in sweep])
    axes[0][0].set_ylabel("time, forward and backward")
    axes[1][0].set_ylabel("peak memory beyond inputs and weights")
    figure.suptitle(f"How time and memory grow, {report.machine['name']}", x=0.01, ha="left")
    handles = [Line2D([], [], **STYLES[name]) for name in LABELS]
    figure.legend(handles, LABELS.values(), loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def _times(axes: Axes, sweep: Sweep) -> None:
    first = next(iter(sweep))
    plain, ours = names(first)
    for name, style in ((plain, "plain"), (ours, "ours"), (LIMIT, "limit")):
        found = curve(sweep, name, seconds)
        axes.plot(*_columns(found), **STYLES[style])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time:g} s"))
    _ratio(axes, first, curve(sweep, plain, seconds), curve(sweep, ours, seconds), "takes {:.2g}× as long")


def _peaks(axes: Axes, sweep: Sweep, free: int | None) -> None:
    first = next(iter(sweep))
    plain, ours = names(first)
    for name, style in ((plain, "plain"), (ours, "ours")):
        axes.plot(*_columns(curve(sweep, name, live_mib)), **STYLES[style])
    beyond = [
        (point.size, row.needed_bytes / MIB)
        for point, rows in sweep.items()
        for row in rows
        if row.contender == plain and not row.seconds and not math.isnan(row.needed_bytes)
    ]
    if beyond:
        measured = curve(sweep, plain, live_mib)[-1:]
        axes.plot(*_columns(measured + beyond), **STYLES["too large"], markevery=slice(len(measured), None))
    if free is not None:
        axes.axhline(free / MIB, **STYLES["memory"])
    _ratio(axes, first, curve(sweep, plain, live_mib), curve(sweep, ours, live_mib), "holds {:.2g}× as much")
    axes.set_yscale("log", base=4)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda mib, _: f"{mib:g} MiB" if mib < 1024 else f"{mib / 1024:g} GiB")
    )


def _ratio(axes: Axes, first: Point, plain: list[tuple[int, float]], ours: list[tuple[int, float]], words: str) -> None:
    """Says how far the two are apart at the largest size that both were run at."""
    both = [(size, value / dict(ours)[size]) for size, value in plain if size in dict(ours)]
    if both:
        size, ratio = both[-1]
        text = f"at {first.sweep}={_short(size)} plain\n{words.format(ratio)}"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=8)


def _logarithmic(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [_short(size) for size in sizes], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, linewidth=0.4, alpha=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Room for the words.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.18)


def _short(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [size for size, _ in points], [value for _, value in points]


__all__ = ["save_plot"]
