"""Draws panels of bars and of lines; everything that a picture shows comes in as plain data.

    bars([[Panel(groups=[("KL", [Bar(2.0, "#0b6e99", "ours")])], ylabel="seconds")]], Path("speed.png"), title="Speed")

A picture is a grid of panels; rows of bars share their vertical axis. One legend is below all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

WIDTH = 0.8  # of the bars of a group
LINE = {"color": "black", "linewidth": 0.8, "linestyle": "--"}


class Bar(NamedTuple):
    """Is one bar; `pale` of its height is a part that all have, `mark` a dash across it."""

    height: float
    colour: str
    name: str = ""  # in the legend
    pale: float = 0.0
    mark: float | None = None


class Line(NamedTuple):
    """Is one line: its points and matplotlib's style."""

    points: Sequence[tuple[float, float]]
    style: dict[str, Any]
    name: str = ""  # in the legend


@dataclass(kw_only=True)
class Panel:
    """Holds groups of bars, each with its label below, or lines over logarithmic axes; `levels` are drawn across."""

    groups: Sequence[tuple[str, Sequence[Bar]]] = ()
    slanted: bool = False  # the groups' labels
    lines: Sequence[Line] = ()
    base: float = 10  # of the vertical axis of lines
    shown: Callable[[float], str] | None = None  # a number of that axis
    levels: Sequence[tuple[float, dict[str, Any]]] = ()
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    text: str = ""  # in the upper left corner of lines


Grid = Sequence[Sequence[Panel]]


def bars(grid: Grid, path: Path, *, title: str, size: tuple[float, float]) -> Path:
    """Draws a grid of panels of bars, of `size` inches, as a picture."""
    figure, axes = plt.subplots(len(grid), len(grid[0]), figsize=size, squeeze=False, sharey="row")
    for panel, axis in _panels(grid, axes):
        for position, (_, group) in enumerate(panel.groups):
            width = WIDTH / max(len(group), 1)
            for k, bar in enumerate(group):
                left = position - WIDTH / 2 + k * width
                shape: dict[str, Any] = {"width": width * 0.92, "align": "edge", "color": bar.colour}
                if bar.pale:
                    axis.bar(left, bar.pale, alpha=0.35, **shape)
                axis.bar(left, max(bar.height - bar.pale, 0), bottom=bar.pale, label=bar.name or None, **shape)
                if bar.mark is not None:
                    axis.hlines(bar.mark, left, left + width, color="black", zorder=3)
        slant: dict[str, Any] = {"rotation": 60, "ha": "right"} if panel.slanted else {}
        axis.set_xticks(range(len(panel.groups)), [label for label, _ in panel.groups], fontsize=8, **slant)
        axis.set_xlim(-0.6, max(len(panel.groups), 2) - 0.4)
    return _finish(figure, axes, path, title)


def lines(grid: Grid, path: Path, *, title: str, size: tuple[float, float], sharey: bool = False) -> Path:
    """Draws a grid of panels of lines, of `size` inches, as a picture; with `sharey` rows have one vertical axis."""
    shared: dict[str, Any] = {"sharex": "col", "sharey": "row" if sharey else False}
    figure, axes = plt.subplots(len(grid), len(grid[0]), figsize=size, squeeze=False, **shared)
    for panel, axis in _panels(grid, axes):
        for line in filter(lambda line: line.points, panel.lines):
            axis.plot(*zip(*line.points, strict=True), label=line.name or None, **line.style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=panel.base)
        sizes = sorted({x for line in panel.lines for x, _ in line.points})
        axis.set_xticks(sizes, list(map(short, sizes)), fontsize=7)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())
        if panel.shown is not None:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _, shown=panel.shown: shown(value)))
        axis.grid(True, linewidth=0.4, alpha=0.6)
        if panel.text:
            low, high = axis.get_ylim()
            axis.set_ylim(low, high * (high / low) ** 0.18)  # room for the words
            axis.text(0.04, 0.96, panel.text, transform=axis.transAxes, va="top", fontsize=8)
    return _finish(figure, axes, path, title)


def _panels(grid: Grid, axes: Any) -> Iterator[tuple[Panel, Any]]:
    """Pairs panels with their axes, which get what all panels have when they are drawn."""
    for panel, axis in zip((panel for row in grid for panel in row), axes.flat, strict=True):
        yield panel, axis
        for level, style in panel.levels:
            axis.axhline(level, **style)
        axis.set_title(panel.title, fontsize=8)
        axis.set_xlabel(panel.xlabel)
        axis.set_ylabel(panel.ylabel)
        axis.spines[["top", "right"]].set_visible(False)


def short(size: float) -> str:
    """Writes a size as axes have it: 512, 2k, 0.03."""
    return f"{size / 1024:g}k" if size and size % 1024 == 0 else f"{size:,g}"


def _finish(figure: Any, axes: Any, path: Path, title: str) -> Path:
    """Adds title and legend, a name once, and writes the picture."""
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        figure.legend(
            handles.values(), handles, loc="lower center", ncols=min(len(handles), 5), frameon=False, fontsize=8
        )
    figure.suptitle(title, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.02 + 0.03 * -(-len(handles) // 5), 1, 1) if handles else (0, 0, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
