"""The suite `scaling`: how time and peak memory grow with N, V, G and P, ours beside the plain way and the limit.

    run(Options(suite="scaling"))                                  # this machine; ten minutes on two cores
    run(Options(suite="scaling", peers=("N",), shapes=("V=128256,H=1024",)))        # one sweep, at other sizes

A row's result is checked in the run whose memory is counted, and only then timed; the rows of a point take turns, and
the bare matrix products with them. Whoever would not fit the memory, by estimate, keeps a row that says what it needs.
The times mean something on a machine that does nothing else; a row that takes seconds is timed once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console

from .live_memory import free_bytes, too_large
from .options import Options
from .passes import PassReport, Step, check_and_time, run_cases
from .passes import load as load_rows
from .running import Run, publish, start
from .scaling_cases import LIMIT, Point, ScalingRow, job, names, points, resident_bytes
from .tables import MIB, Table, describe, why

SECONDS = 1.0
MEANING = {
    "N": "rows of the output layer's loss",
    "V": "vocabulary of the output layer's loss",
    "G": "completions of one prompt",
    "P": "tokens of the prompt",
}

ScalingReport: TypeAlias = PassReport[ScalingRow]
Sweep: TypeAlias = dict[Point, list[ScalingRow]]  # in the order of sizes


def run(options: Options, *, progress: Console | None = None) -> Path:
    """Measure, save, show; returns the path of the JSON. Raises `ArgumentError`."""
    this = start(options, seconds=SECONDS, progress=progress)
    free = free_bytes(torch.device(this.device))
    this.machine["free_bytes"] = None if math.isinf(free) else int(free)
    run_cases(this, points(options, this.device), partial(measure, this), title=str)
    report = load(this.path)  # every table shows the numbers that are on disk
    publish(
        this,
        markdown=markdown(report),
        save_plots=lambda: _plot(report, this.path.with_suffix(".png")),
        tables=[*(sweep_table(sweep) for sweep in sweeps(report)), overview(report)],
    )
    return this.path


def measure(this: Run, point: Point) -> list[ScalingRow]:
    """The rows of a point: the plain way, ours, the limit."""
    device = torch.device(this.device)
    reason = too_large(resident_bytes(point), free_bytes(device))
    if reason is not None:
        return [ScalingRow(group=point, contender=name, reason=reason) for name in (*names(point), LIMIT)]
    this_job = job(point, this.device)
    rows: list[ScalingRow] = []

    def candidates() -> Iterator[tuple[ScalingRow, Callable[[], Step]]]:
        for one in this_job.candidates:
            reason = too_large(one.needed, free_bytes(device))
            row = ScalingRow(group=point, contender=one.name, needed_bytes=one.needed, reason=reason)
            rows.append(row)
            yield row, one.build

    limit = ScalingRow(group=point, contender=LIMIT)
    once = point.is_large and device.type == "cpu" and this.options.seconds is None
    check_and_time(
        candidates(),
        this_job.judge,
        device,
        seconds_per_row=0.0 if once else this.seconds,
        limits=[(limit, this_job.products)],
        exact=this_job.exact,
    )
    if not limit.seconds:
        limit.reason = "not run: there is nothing that it would limit"
    return [*rows, limit]


def sweeps(report: ScalingReport) -> list[Sweep]:
    """The points that differ in one size only, smallest first."""
    found: dict[tuple[str, str], Sweep] = {}
    for point, rows in report.by_case().items():
        found.setdefault((point.sweep, point.fixed), {})[point] = rows
    return [dict(sorted(sweep.items(), key=lambda entry: entry[0].size)) for sweep in found.values()]


def curve(sweep: Sweep, name: str, value: Callable[[ScalingRow], float]) -> list[tuple[int, float]]:
    """(size, value) of a contender wherever it was timed."""
    return [
        (point.size, value(row))
        for point, rows in sweep.items()
        for row in rows
        if row.contender == name and row.seconds
    ]


def seconds(row: ScalingRow) -> float:
    return row.median


def live_mib(row: ScalingRow) -> float:
    return math.nan if row.live_bytes is None else row.live_bytes / MIB


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """x of size^x, by least squares over the larger half of the points; NaN for fewer than two."""
    half = points[-max(2, math.ceil(len(points) / 2)) :]
    if len(half) < 2 or not all(value > 0 for _, value in half):
        return math.nan
    logs = [(math.log(size), math.log(value)) for size, value in half]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def sweep_table(sweep: Sweep) -> Table:
    """One line per size."""
    first = next(iter(sweep))
    plain, ours = names(first)
    table = Table(
        f"{first.sweep}, {MEANING[first.sweep]}; {first.fixed}: forward and backward",
        (
            first.sweep,
            *(f"{name}, s" for name in (plain, ours, LIMIT)),
            f"{plain} / {ours}",
            f"{ours} / matmuls",
            *(f"{name}, peak MiB" for name in (plain, ours)),
            "gradients, MiB",
        ),
    )
    for point, rows in sweep.items():
        by_name = {row.contender: row for row in rows}
        times = [by_name[name].median for name in (plain, ours, LIMIT)]
        gradients = max(row.gradient_bytes for row in rows) / MIB
        table.add(
            f"{point.size:,}",
            *(_number(time) for time in times),
            _number(times[0] / times[1], "×"),
            _number(times[1] / times[2], "×"),
            *(_number(live_mib(by_name[name])) for name in (plain, ours)),
            _number(gradients or math.nan),
        )
        table.notes += [
            f"{point.sweep}={point.size:,}, {row.contender}: {why(row.reason)}" for row in rows if row.reason
        ]
    return table


def _number(value: float, unit: str = "") -> str:
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def overview(report: ScalingReport) -> Table:
    """One line per sweep: how each contender grows, and how far the plain way came."""
    table = Table(
        "Growth: x where time or peak memory is about size^x, over the larger half of a sweep",
        (
            "varies",
            "fixed",
            *(f"time, {name}" for name in ("plain", "sdcore", "matmuls")),
            *(f"peak, {name}" for name in ("plain", "sdcore")),
            "largest, plain",
            "largest, sdcore",
        ),
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
            *("–" if math.isnan(x) else f"{x:.2f}" for x in (*times, *peaks)),
            *("–" if size is None else f"{size:,}" for size in largest),
        )
    return table


def markdown(report: ScalingReport) -> str:
    """The whole report as a file beside its JSON."""
    head = ["# Benchmark of scaling", describe(report.general), overview(report).markdown()]
    return "\n\n".join([*head, *(sweep_table(sweep).markdown() for sweep in sweeps(report))]) + "\n"


def load(path: Path) -> ScalingReport:
    return load_rows(path, ScalingRow, Point)


def _plot(report: ScalingReport, path: Path) -> list[Path]:
    from .scaling_plot import save_plot

    return save_plot(report, path)


__all__ = [
    "MEANING",
    "ScalingReport",
    "curve",
    "exponent",
    "live_mib",
    "load",
    "markdown",
    "measure",
    "overview",
    "run",
    "seconds",
    "sweep_table",
    "sweeps",
]
