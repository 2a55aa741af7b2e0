"""Speed against workspace: which of the measured sizes is enough, per head.

The report of `divergence` with one contender for each size, `at_workspace(megabytes)`; a point is the multiple of the
bare matrix products that the contender takes, the mean over the divergences that were measured.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from typing import Final, NamedTuple

from sdkernels.tile.tuned import WorkspaceRow

from ..peers import SDCORE
from ..report import Report
from ..shapes import Shape
from ..tables import Table, by_group, floor_seconds

MEGABYTES: Final[tuple[int, ...]] = (128, 256, 512, 768, 1024, 1536, 2048)
QUICK_MEGABYTES: Final[tuple[int, ...]] = (32, 64)
# The goals' bound, and how much slower than the fastest within it the recommended one may be.
MOST_MEGABYTES: Final = 1536
ABOUT_AS_FAST: Final = 1.02


class Head(NamedTuple):
    """What a curve is of."""

    shape: Shape
    frozen: bool

    def __str__(self) -> str:
        return f"{self.shape}, {'frozen' if self.frozen else 'trained'} head"


def curves(report: Report) -> dict[Head, dict[int, float]]:
    """Per head, by MiB, the multiple of the matrix products; a size that failed at a divergence has no point."""
    found: dict[Head, dict[int, list[float]]] = {}
    groups: dict[Head, int] = {}
    for group, rows in by_group(report.speed).items():
        head = Head(group.shape, group.frozen_head)
        groups[head] = groups.get(head, 0) + 1
        for row in rows:
            size = re.fullmatch(rf"{SDCORE.name}, (\d+) MB", row.contender)
            if size is not None and not row.reason:
                points = found.setdefault(head, {}).setdefault(int(size[1]), [])
                points.append(row.median / floor_seconds(rows))
    return {
        head: {size: statistics.mean(points) for size, points in by_size.items() if len(points) == groups[head]}
        for head, by_size in found.items()
    }


def recommended(points: Mapping[int, float]) -> int | None:
    """The smallest size that is about as fast as any within the goals' bound; None without a point there."""
    within = {size: multiple for size, multiple in points.items() if size <= MOST_MEGABYTES}
    if not within:
        return None
    return min(size for size, multiple in within.items() if multiple <= ABOUT_AS_FAST * min(within.values()))


def workspace_rows(report: Report) -> list[WorkspaceRow]:
    """For the table that `backend="auto"` reads: of trained heads, a frozen one has its default."""
    rows = []
    for head, points in curves(report).items():
        size = recommended(points)
        if size is not None and not head.frozen:
            rows.append(WorkspaceRow(head.shape.vocab, head.shape.hidden, size))
    return rows


def curve_table(report: Report) -> Table:
    """A line per head, a column per size."""
    found = curves(report)
    sizes = sorted({size for points in found.values() for size in points})
    table = Table(
        "Speed against workspace: multiples of the bare matrix products, the mean of the divergences",
        ("head", *(f"{size} MB" for size in sizes), "enough"),
    )
    for head, points in found.items():
        enough = recommended(points)
        cells = (f"{points[size]:.2f}" if size in points else "–" for size in sizes)
        table.add(str(head), *cells, "–" if enough is None else f"{enough} MB")
    return table


__all__ = [
    "ABOUT_AS_FAST",
    "MEGABYTES",
    "MOST_MEGABYTES",
    "QUICK_MEGABYTES",
    "Head",
    "curve_table",
    "curves",
    "recommended",
    "workspace_rows",
]
