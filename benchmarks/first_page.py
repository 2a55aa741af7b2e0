"""Makes the README's table and picture from committed results.

    python benchmarks/first_page.py

prints the table and draws `docs/images/first-page.png`, with matplotlib. Both read files of one machine and date, so
that every number on the first page is of one version. `tests/test_docs.py` compares the table with the README's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sdcore import charts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-processor-2-threads"
DATE = "2026-11-28"
SHAPE = "n-1024-v-32000-h-1024-{dtype}-naive-compile-trl-liger"
PICTURE = ROOT / "docs" / "images" / "first-page.png"

# The README's columns, by the contenders' names in the results.
COLUMNS = {
    "sdcore": "**sdcore**",
    "plain torch": "plain PyTorch",
    "torch.compile": "torch.compile",
    "TRL chunked": "TRL",
    "Liger chunked": "Liger",
}
SPEED = [
    ("fp32", "reverse KL"),
    ("fp32", "JSD"),
    ("bf16", "reverse KL"),
    ("bf16", "JSD"),
    ("bf16", "JSD, top-100 + tail"),
]
MEMORY = [("bf16", "reverse KL"), ("bf16", "JSD")]
LARGEST = {"N": 16_384, "G": 32}  # that the picture shows
NOISE = 0.03  # between the teacher's states and the student's, where they are of size 1


def table() -> str:
    """Returns the README's table: time, memory and gradient error of one loss, forward and backward."""
    files = {dtype: read(SHAPE.format(dtype=dtype)) for dtype in ("fp32", "bf16")}
    lines = [["", "limit", *COLUMNS.values()], ["---", *["---:"] * (1 + len(COLUMNS))]]
    for dtype, divergence in SPEED:
        rows = rows_of(files[dtype]["speed"], divergence)
        limit = min(median(row["seconds"]) for name, row in rows.items() if name.startswith("four matmuls"))
        cells = [f"{median(row['seconds']) / limit:.2f}×" if row["seconds"] else "–" for row in contenders(rows)]
        lines.append([f"time, {dtype} {divergence}", f"{1e3 * limit:.0f} ms", *cells])
    for dtype, divergence in MEMORY:
        rows = rows_of(files[dtype]["memory"], divergence)
        limit = rows["sdcore"]["gradient_bytes"]
        cells = [_mebibytes(row) for row in contenders(rows)]
        lines.append([f"peak MiB, {dtype} {divergence}", f"{limit / 2**20:.0f}", *cells])
    near = [row for row in read("")["accuracy"] if row["noise"] == NOISE]
    cells = [f"{100 * max(row['errors'][1:]):.2g} %" if row else "–" for row in contenders(rows_of(near, "reverse KL"))]
    lines.append(["gradient error, bf16 reverse KL", "–", *cells])
    for line in lines[2:]:
        line[2] = f"**{line[2]}**"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(folder: str) -> dict[str, Any]:
    return json.loads((RESULTS / folder / f"{DATE}.json").read_text(encoding="utf-8"))


def rows_of(rows: list[dict[str, Any]], divergence: str) -> dict[str, dict[str, Any]]:
    """Returns the rows of one divergence by the contender's name."""
    return {row["contender"]: row for row in rows if row["divergence"]["name"] == divergence}


def contenders(rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows in the order of the columns; an empty one where a contender was not measured."""
    return [rows.get(name, {}) for name in COLUMNS]


def _mebibytes(row: Mapping[str, Any]) -> str:
    # Inside a compiled graph no live tensor is seen: what is left is how much the process grew.
    live = row["live_bytes"] is not None
    return f"{row['live_bytes' if live else 'resident_bytes'] / 2**20:.0f}{'' if live else '*'}"


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
    sys.stdout.write(f"{table()}\n")
    draw(PICTURE)
