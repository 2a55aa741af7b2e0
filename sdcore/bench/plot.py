"""Three pictures of a report: times over the floor, bytes, errors. One colour per contender in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from .live_memory import MemoryRow
from .peers import (
    COMPILED,
    FLASH_LINEAR_ATTENTION,
    LIGER,
    LIGER_CUTE,
    LIGER_TRITON,
    ORDA,
    PLAIN,
    PLAIN_LOW_PRECISION,
    SDCORE,
    SDCORE_RECOMPUTE,
    TRL,
)
from .report import Report
from .tables import by_group, floor_seconds, memory_selection

# Ours stand out; the others are told apart by hue and, in the line plots, by marker.
COLOURS = {
    SDCORE.name: "#0b6e99",
    SDCORE_RECOMPUTE.name: "#6bb7d6",
    LIGER.name: "#e08a1e",
    LIGER_TRITON.name: "#b8621b",
    LIGER_CUTE.name: "#8a4a10",
    COMPILED.name: "#8a7fb5",
    TRL.name: "#c8443c",
    PLAIN.name: "#8c8c8c",
    PLAIN_LOW_PRECISION.name: "#4d4d4d",
    ORDA.name: "#7a9a3a",
    FLASH_LINEAR_ATTENTION.name: "#a0527a",
}
MARKERS = dict(zip(COLOURS, "oDs^<vPXd*p", strict=True))
MIB = 1 << 20
BAR = 0.8


def save_plots(report: Report, path: Path) -> list[Path]:
    """Write `<path>-speed.png`, `-memory.png` and `-accuracy.png`, those for which something was measured."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figures = {"speed": _speed, "memory": _memory, "accuracy": _accuracy}
    written = []
    for name, draw in figures.items():
        if all(row.reason for row in getattr(report, name)):
            continue
        figure = draw(report)
        target = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(target, dpi=110)
        plt.close(figure)
        written.append(target)
    return written


def _speed(report: Report) -> Any:
    groups = by_group(report.speed)
    panels = list(dict.fromkeys((group.shape, group.dtype) for group in groups))
    shapes = list(dict.fromkeys(shape for shape, _ in panels))
    dtypes = list(dict.fromkeys(dtype for _, dtype in panels))
    figure, axes = plt.subplots(
        len(dtypes),
        len(shapes),
        figsize=(max(8.0, 1.5 + 3.5 * len(shapes)), 1.2 + 3.1 * len(dtypes)),
        squeeze=False,
        sharey="row",
    )
    for i, dtype in enumerate(dtypes):
        for j, shape in enumerate(shapes):
            members = {g: rows for g, rows in groups.items() if g.shape == shape and g.dtype == dtype}
            _speed_panel(axes[i][j], members)
            axes[i][j].set_title(f"{shape}, {dtype}", fontsize=9)
        axes[i][0].set_ylabel("time / four bare matmuls")
    _legend(figure, axes)
    title = f"linear_divergence, forward + backward, {report.machine['name']} (under the names: sdcore)"
    figure.suptitle(title, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def _speed_panel(axes: Axes, groups: dict[Any, Any]) -> None:
    labels = [group.work.replace(", ", ",\n") for group in groups]
    for position, rows in enumerate(groups.values()):
        floor = floor_seconds(rows)
        timed = [row for row in rows if row.contender in COLOURS and not row.reason]
        width = BAR / max(len(timed), 1)
        for k, row in enumerate(sorted(timed, key=lambda row: row.median)):
            left = position - BAR / 2 + k * width
            ratio = row.median / floor
            axes.bar(left, ratio, width * 0.92, align="edge", color=COLOURS[row.contender], label=row.contender)
            if row.contender == SDCORE.name:
                labels[position] += f"\n{ratio:.2f}×"
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    # A panel with one group keeps the bar width of its neighbours.
    axes.set_xlim(-0.6, max(len(groups), 2) - 0.4)


def _memory(report: Report) -> Any:
    selected = memory_selection(report.memory)
    dtype = selected[-1].group.dtype
    rows = [row for row in selected if row.group.dtype == dtype]
    groups = list(dict.fromkeys(row.group for row in rows))
    figure, axes = plt.subplots(figsize=(max(8.0, 2.0 + 2.1 * len(groups)), 4.2))
    drawn = [[row for row in rows if row.group == group and _bytes(row)] for group in groups]
    width = BAR / max(map(len, drawn))
    for position, members in enumerate(drawn):
        for k, row in enumerate(sorted(members, key=_bytes)):
            left = position + (k - len(members) / 2) * width
            beyond = max(_bytes(row) - row.gradient_bytes, 0) / MIB
            colour = COLOURS.get(row.contender, COLOURS[SDCORE.name])  # ours with a workspace of its own
            axes.bar(left, row.gradient_bytes / MIB, width * 0.92, align="edge", color=colour, alpha=0.35)
            axes.bar(
                left,
                beyond,
                width * 0.92,
                bottom=row.gradient_bytes / MIB,
                align="edge",
                color=colour,
                label=row.contender,
            )
            axes.text(
                left + width / 2,
                _bytes(row) / MIB,
                f" {_bytes(row) / MIB:.0f}",
                ha="center",
                va="bottom",
                fontsize=6.5,
                rotation=90,
            )
    axes.set_xticks(range(len(groups)), [f"{group.shape}\n{group.work}" for group in groups])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("peak MiB beyond the inputs")
    axes.margins(y=0.12)
    figure.suptitle(f"Peak memory of one step, {dtype} (pale: the gradients)", x=0.01, ha="left")
    _legend(figure, [[axes]])
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def _bytes(row: MemoryRow) -> int:
    return (row.live_bytes if row.live_bytes is not None else row.resident_bytes) or 0


def _accuracy(report: Report) -> Any:
    divergences = list(dict.fromkeys(row.divergence for row in report.accuracy))
    figure, axes = plt.subplots(
        2, len(divergences), figsize=(1.5 + 2.4 * len(divergences), 6.2), squeeze=False, sharex=True, sharey="row"
    )
    for j, divergence in enumerate(divergences):
        members = [row for row in report.accuracy if row.divergence == divergence and row.errors is not None]
        for contender in dict.fromkeys(row.contender for row in members):
            points = [(row.noise, row.errors) for row in members if row.contender == contender and row.errors]
            style = {
                "color": COLOURS[contender],
                "marker": MARKERS[contender],
                "markersize": 5,
                "label": contender,
                "linewidth": 2.2 if contender == SDCORE.name else 1.2,
                "zorder": 4 if contender == SDCORE.name else 2,
            }
            # An exact zero has no place on a logarithmic axis.
            axes[0][j].plot(*zip(*((noise, max(e.loss, 1e-9)) for noise, e in points), strict=True), **style)
            axes[1][j].plot(*zip(*((noise, max(e.gradient, 1e-9)) for noise, e in points), strict=True), **style)
        axes[0][j].set_title(str(divergence).replace(", ", ",\n"), fontsize=9)
        axes[1][j].set_xlabel("teacher − student (noise)")
    noises = sorted({row.noise for row in report.accuracy})
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(noises, [f"{noise:g}" for noise in noises])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(True, axis="y", linewidth=0.4, alpha=0.6)
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes[0][0].set_ylabel("relative error of the loss")
    axes[1][0].set_ylabel("relative error of the gradients")
    _legend(figure, axes)
    figure.suptitle(
        f"Error against float64, {report.accuracy[0].shape}, bf16 inputs (dashed: 100 %)", x=0.01, ha="left"
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def _legend(figure: Any, axes: Any) -> None:
    found: dict[str, Any] = {}
    for row in axes:
        for axis in row:
            handles, labels = axis.get_legend_handles_labels()
            found.update(zip(labels, handles, strict=True))
    names = [name for name in COLOURS if name in found]
    figure.legend(
        [found[name] for name in names],
        names,
        loc="lower center",
        ncols=min(len(names), 9 if len(axes[0]) > 2 else 4),
        frameon=False,
        fontsize=8,
    )


__all__ = ["save_plots"]
