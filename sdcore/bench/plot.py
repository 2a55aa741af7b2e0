"""Draws panels of bars and of lines; everything that a picture shows comes in as plain data.

    bars([[BarPanel([("KL", [Bar(2.0, "#0b6e99", "ours")])], ylabel="seconds")]], Path("speed.png"), title="Speed")

A picture is a grid of panels; rows of bars share their vertical axis. One legend is below all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

WIDTH = 0.8  # of the bars of a group
LINE = {"color": "black", "linewidth": 0.8, "linestyle": "--"}


@dataclass
class Bar:
    """Is one bar; `pale` of its height is a part that all have, `mark` a dash across it, `text` stands above."""

    height: float
    colour: str
    name: str = ""  # in the legend
    pale: float = 0.0
    mark: float | None = None
    text: str = ""


@dataclass
class BarPanel:
    """Holds groups of bars, each with its label below; `line` is drawn across, dashed."""

    groups: Sequence[tuple[str, Sequence[Bar]]]
    title: str = ""
    ylabel: str = ""
    line: float | None = None
    slanted: bool = False  # labels
    least_groups: int = 1  # room for so many, so that panels have bars of one width


@dataclass
class Line:
    """Is one line: its points and matplotlib's style."""

    points: Sequence[tuple[float, float]]
    style: dict[str, Any]
    name: str = ""  # in the legend


@dataclass
class LinePanel:
    """Holds lines over logarithmic axes; `levels` are drawn across."""

    lines: Sequence[Line]
    ticks: dict[float, str]  # of the horizontal axis
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    levels: Sequence[tuple[float, dict[str, Any]]] = ()
    text: str = ""  # in the upper left corner
    base: float = 10  # of the vertical axis
    shown: Callable[[float], str] | None = None  # a number of the vertical axis


def bars(grid: Sequence[Sequence[BarPanel]], path: Path, *, title: str, size: tuple[float, float]) -> Path:
    """Draws a grid of bar panels of `size` inches as a picture."""
    figure, axes = plt.subplots(len(grid), len(grid[0]), figsize=size, squeeze=False, sharey="row")
    for panels, row in zip(grid, axes, strict=True):
        for panel, axis in zip(panels, row, strict=True):
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
                    middle = left + width / 2
                    axis.text(middle, bar.height, bar.text, ha="center", va="bottom", fontsize=6.5, rotation=90)
            if panel.line is not None:
                axis.axhline(panel.line, **LINE)
            slant: dict[str, Any] = {"rotation": 60, "ha": "right"} if panel.slanted else {}
            axis.set_xticks(range(len(panel.groups)), [label for label, _ in panel.groups], fontsize=8, **slant)
            axis.set_xlim(-0.6, max(len(panel.groups), panel.least_groups) - 0.4)
            axis.set_title(panel.title, fontsize=8)
            axis.set_ylabel(panel.ylabel)
    return _finish(figure, axes, path, title)


def lines(grid: Sequence[Sequence[LinePanel]], path: Path, *, title: str, size: tuple[float, float]) -> Path:
    """Draws a grid of line panels of `size` inches as a picture."""
    figure, axes = plt.subplots(len(grid), len(grid[0]), figsize=size, squeeze=False, sharex="col")
    for panels, row in zip(grid, axes, strict=True):
        for panel, axis in zip(panels, row, strict=True):
            for line in filter(lambda line: line.points, panel.lines):
                axis.plot(*zip(*line.points, strict=True), label=line.name or None, **line.style)
            for level, style in panel.levels:
                axis.axhline(level, **style)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=panel.base)
            axis.set_xticks(list(panel.ticks), list(panel.ticks.values()), fontsize=7)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_formatter(NullFormatter())
            if panel.shown is not None:
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _, shown=panel.shown: shown(value)))
            axis.grid(True, linewidth=0.4, alpha=0.6)
            if panel.text:
                low, high = axis.get_ylim()
                axis.set_ylim(low, high * (high / low) ** 0.18)  # room for the words
                axis.text(0.04, 0.96, panel.text, transform=axis.transAxes, va="top", fontsize=8)
            axis.set_title(panel.title, fontsize=9)
            axis.set_xlabel(panel.xlabel)
            axis.set_ylabel(panel.ylabel)
    return _finish(figure, axes, path, title)


def _finish(figure: Any, axes: Any, path: Path, title: str) -> Path:
    """Adds title and legend, a name once, and writes the picture."""
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
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
