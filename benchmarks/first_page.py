"""Makes the README's picture from committed results; its table is a block of `sdcore bench --readme`.

    python benchmarks/first_page.py

draws `docs/images/first-page.png`, with matplotlib.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sdcore import charts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-processor-2-threads"
DATE = "2026-11-28"
PICTURE = ROOT / "docs" / "images" / "first-page.png"

LARGEST = {"N": 16_384, "G": 32}  # that the picture shows


def read(folder: str) -> dict[str, Any]:
    return json.loads((RESULTS / folder / f"{DATE}.json").read_text(encoding="utf-8"))


def draw(file: Path) -> None:
    """Draws how time and memory grow: with whole logits, with whole prompts, and with sdcore."""
    rows, completions = "N, rows of the loss (V=32,000 H=512, JSD)", "G, completions of one prompt (P=512 R=64)"
    logits, prompts = ("plain torch", "whole logits"), ("naive batch", "a prompt per completion")
    panels = [
        partial(_panel, title="Time of the loss, seconds", of=("N", "seconds"), plain=logits, ours="sdcore"),
        partial(_panel, title="Peak memory of the loss, MiB", of=("N", "live_bytes"), plain=logits, ours="sdcore"),
        partial(_panel, title="Time of a pass, seconds", of=("G", "seconds"), plain=prompts, ours="packed"),
    ]
    figure = charts.figure_of(panels, columns=3, size=(4.0, 3.6))
    for axes, label in zip(figure.axes, (rows, rows, completions), strict=True):
        axes.set_xlabel(label)
    file.parent.mkdir(exist_ok=True)
    charts.save(figure, file, dpi=130)


def _panel(axes: Any, title: str, of: tuple[str, str], plain: tuple[str, str], ours: str) -> None:
    lines: dict[str, dict[str, Any]] = {
        plain[0]: {"label": plain[1], "color": "#8a8a8a", "marker": "s"},
        ours: {"label": "sdcore", "color": "#0b6e99", "marker": "o"},
        "matmuls alone": {"label": "matrix products", "color": "#222222", "linestyle": "--"},
    }
    points = {name: _points(*of, contender=name) for name in lines}
    for name, style in lines.items():
        if points[name]:
            charts.line(axes, list(points[name]), list(points[name].values()), **style | {"linewidth": 2})
    last = max(points[plain[0]])
    above, below = points[plain[0]][last], points[ours][last]
    axes.annotate("", (last, above), (last, below), arrowprops={"arrowstyle": "<->", "color": "#c0392b", "lw": 1.5})
    axes.text(last * 1.12, (above * below) ** 0.5, f"{above / below:.2g}×", color="#c0392b", weight="bold", va="center")
    sizes = list(points[ours])
    charts.log_scale(axes, y=10)
    charts.sizes_on_x(axes, sizes)
    axes.set_xlim(0.8 * sizes[0], 2.9 * last)
    axes.set_title(title, weight="bold")


def _points(sweep: str, what: str, contender: str) -> dict[int, float]:
    """Returns seconds, or MiB, by the size that the sweep varies."""
    points = {}
    for row in read("scaling")["rows"]:
        size = int(row["group"]["sizes"].partition(",")[0].partition("=")[2])
        if row["group"]["sweep"] == sweep and row["contender"] == contender and row[what]:
            points[size] = median(row[what]) if what == "seconds" else row[what] / 2**20
    return {size: value for size, value in points.items() if size <= LARGEST[sweep]}


if __name__ == "__main__":
    draw(PICTURE)
