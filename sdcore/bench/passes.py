"""Measures the cases of a suite of whole passes (all but `divergence`), and keeps and shows their rows.

A contender's step is checked against the first one's in the run whose memory is counted, and only then timed; the rows
of a case take turns, and with them the limits: matrix products alone. What would not fit the memory keeps its row and
is not tried. A run is one JSON, a row per line, saved after every case, so that an interruption does not lose those
before it.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdkernels.live_bytes import free_bytes

from .. import charts
from ..charts import Bar, figure_of, save
from .limit import LIMITS, SHARED, Products
from .measure import check_and_time, too_large
from .options import Options
from .oracle import relative_error
from .rows import Outcome, PassReport, PassRow, Step, write
from .suite import Run
from .tables import Table, format_error, mebibytes, ratio, why

# What every row has on disk.
FIGURES = ("gradient_error", "live_bytes", "resident_bytes", "gradient_bytes")
COMMON = ("contender", "setting", "seconds", "errors", "reason", *FIGURES)
MAY_BE_UNKNOWN = ("gradient_error", "values_error", "allowed", "needed_bytes")
# A head, which may name the reference, and a cell made of a row and the reference.
Column = tuple[str, Callable[[PassRow, PassRow | None], str]]


@dataclass(kw_only=True)
class PassSuite:
    """Says what distinguishes a suite of whole passes; `setup` is what the contenders of a case have in common."""

    name: str
    title: str  # of its page
    seconds: float  # for a row, by default
    picture: str = ""  # what benchmarks/README.md calls its picture; empty: it shows none
    case: Callable[..., Any]  # what a row is a row of
    # Names on disk, and of which attribute: of a case, and of what a row has beyond COMMON.
    case_fields: Mapping[str, str]
    row_fields: Mapping[str, str]
    named: Callable[[Any], str]  # a case, as titles have it
    cases: Callable[[Options, str], list[Any]]  # of a run on a device
    contenders: Callable[[Any], Sequence[Any]]  # of a case
    setup: Callable[[Any, str], Any]  # of a case on a device
    limits: Callable[[Any], list[tuple[str, Products]]]  # of a setup
    judge: Callable[[PassRow, Outcome, Outcome], str | None]  # notes errors in a row; why it is not to be timed
    # By estimate: what is there whoever runs a case, and what a contender needs beyond that (0: nobody asks).
    resident_bytes: Callable[[Any], float]
    needed_bytes: Callable[[Any, Any], float] = lambda setup, contender: 0.0
    allowed: Callable[[Any, Any], float] = lambda setup, contender: math.nan
    is_large: Callable[[Any], bool] = lambda case: False  # takes a CPU seconds: timed once, unless seconds are given
    limits_left_out: Sequence[str] = ()  # which have a row in a case that does not fit
    notes_free_memory: bool = False  # beside the machine
    about: Callable[[PassReport], list[str]] = lambda report: []  # what was measured, beside the machine
    overviews: Callable[[PassReport], list[Table]]  # everything at a glance
    per_case: Callable[[PassReport], list[Table]] | None = None  # None: `case_table` of each case
    draw: Callable[[PassReport, Path], Any]
    reference: Callable[[Sequence[PassRow]], PassRow | None] = lambda rows: None
    columns: Sequence[Column] = ()
    is_ours: Callable[[PassRow], bool] = lambda row: row.ours
    notes: Callable[[Sequence[PassRow]], list[str]] = lambda rows: []

    def measure(self, run: Run) -> None:
        """Measures case after case."""
        planned = self.cases(run.options, run.device)
        if self.notes_free_memory:
            run.machine["free_bytes"] = free_bytes(torch.device(run.device))
        report = PassReport(machine=run.machine)
        for number, case in enumerate(planned, start=1):
            began = time.perf_counter()
            rows = self.measure_one(run, case)
            report.rows += rows
            timed = sum(not row.reason for row in rows)
            run.progress.print(
                f"[{number}/{len(planned)}] {self.named(case)}: {timed} of {len(rows)} rows timed, "
                f"{time.perf_counter() - began:.0f} s"
            )
            self.save(report, run.path)
            gc.collect()

    def measure_one(self, run: Run, case: Any) -> list[PassRow]:
        """Measures a case, or says in each of its rows why it does not fit."""
        reason = too_large(self.resident_bytes(case), free_bytes(torch.device(run.device)))
        chosen = self.contenders(case)
        if reason is not None:
            ours = {contender.name: contender.ours for contender in chosen} | dict.fromkeys(self.limits_left_out, False)
            return [PassRow(group=case, contender=name, ours=mine, reason=reason) for name, mine in ours.items()]
        once = self.is_large(case) and run.device == "cpu" and run.options.seconds is None
        return self.measure_case(self.setup(case, run.device), chosen, seconds_per_row=0.0 if once else run.seconds)

    def measure_case(self, setup: Any, chosen: Sequence[Any], *, seconds_per_row: float) -> list[PassRow]:
        """Checks, then times; repetitions come to `seconds_per_row`, or to the least number."""
        rows: list[PassRow] = []

        def candidates() -> Iterator[tuple[PassRow, Callable[[], Step]]]:
            for contender in chosen:
                row = PassRow(group=setup.case, contender=contender.name, ours=contender.ours)
                row.allowed, row.needed_bytes = self.allowed(setup, contender), self.needed_bytes(setup, contender)
                row.reason = too_large(row.needed_bytes, free_bytes(setup.device))
                rows.append(row)
                yield row, partial(contender.build, setup, contender)

        limits = [
            (PassRow(group=setup.case, contender=name, ours=False), products) for name, products in self.limits(setup)
        ]
        check_and_time(
            candidates(), self.judge, setup.device, seconds_per_row=seconds_per_row, limits=limits, exact=setup.exact
        )
        for row, _ in limits:
            row.reason = None if row.seconds else "not run: there is nothing that it would limit"
        return rows + [row for row, _ in limits]

    def save(self, report: PassReport, path: Path) -> None:
        rows = []
        for row in report.rows:
            group = {name: getattr(row.group, attribute) for name, attribute in self.case_fields.items()}
            figures = {name: getattr(row, attribute) for name, attribute in self.row_fields.items()}
            rows.append({"group": group} | {name: getattr(row, name) for name in COMMON} | figures)
        write(path, report.machine, {"rows": rows})

    def load(self, path: Path) -> PassReport:
        stored = json.loads(path.read_text())
        report = PassReport(machine=stored["machine"])
        for entry in stored["rows"]:
            group = self.case(**{self.case_fields[name]: value for name, value in entry.pop("group").items()})
            figures = {self.row_fields.get(name, name): value for name, value in entry.items()}
            unknown = {name: math.nan for name in MAY_BE_UNKNOWN if figures.get(name) is None}
            report.rows.append(PassRow(**figures | unknown | {"group": group}))
        return report

    def details(self, report: PassReport) -> list[Table]:
        if self.per_case is not None:
            return self.per_case(report)
        return [self.case_table(case, rows) for case, rows in report.by_case().items()]

    def case_table(self, case: Any, rows: Sequence[PassRow]) -> Table:
        """Shows all there is to know about one case."""
        base, least = self.reference(rows), limit(rows)
        whose = "TRL" if base is None or base.contender.startswith("TRL") else base.contender
        heads = [head.format(base=whose) for head, _ in self.columns]
        table = Table(self.named(case), ("contender", *heads, *(["of the matmuls"] if least else [])))
        for row in rows:
            if row.reason:
                table.notes.append(f"{row.contender}: {why(row.reason)}")
                continue
            multiple = [ratio(row.median / least.median, "×")] if least else []
            table.add(row.contender, *(cell(row, base) for _, cell in self.columns), *multiple, ours=self.is_ours(row))
        gradients = max((row.gradient_bytes for row in rows), default=0)
        if gradients:
            table.notes.append(f"The parameters' gradients are {mebibytes(gradients)} MiB of every peak.")
        table.notes += self.notes(rows)
        return table

    def save_plots(self, report: PassReport, path: Path) -> list[Path]:
        picture = path.with_suffix(".png")
        self.draw(report, picture)
        return [picture]


def compare(outcome: Outcome, exact: Outcome) -> tuple[float, float]:
    """Returns the relative errors of the states (or the loss), and of all gradients together; NaN without any."""
    values = relative_error(outcome.values, exact.values)
    if not exact.gradients:
        return values, math.nan
    if outcome.gradients.keys() != exact.gradients.keys():
        return values, math.inf
    norms = [
        (
            torch.linalg.vector_norm(outcome.gradients[name] - gradient, dtype=torch.float64).item(),
            torch.linalg.vector_norm(gradient, dtype=torch.float64).item(),
        )
        for name, gradient in exact.gradients.items()
    ]
    error = math.hypot(*(wrong for wrong, _ in norms)) / math.hypot(*(size for _, size in norms))
    return values, math.inf if math.isnan(error) else error


def limit(rows: Sequence[PassRow]) -> PassRow | None:
    """Returns the products alone with everything shared; None in results from before they were timed."""
    return next((row for row in rows if row.contender == SHARED and row.seconds), None)


def models_of(report: PassReport) -> list[str]:
    return [row.group.model for row in report.rows]


def timed_rows(rows: Sequence[PassRow]) -> list[PassRow]:
    """Returns the rows that pictures show: those that were timed and are no limit."""
    return [row for row in rows if not row.reason and row.contender not in LIMITS]


def speedup(row: PassRow, base: PassRow | None) -> float:
    return base.median / row.median if base is not None and row.seconds else math.nan


def memory_share(row: PassRow, base: PassRow | None) -> float:
    """Returns the share of the base's peak; NaN where one of them is not known."""
    if base is None or not base.live_bytes or row.live_bytes is None:
        return math.nan
    return row.live_bytes / base.live_bytes


def milliseconds(row: PassRow) -> str:
    return f"{row.median * 1e3:.0f} ms" if row.median >= 0.1 else f"{row.median * 1e3:.1f} ms"


def errors(row: PassRow) -> str:
    return " / ".join(format_error(e) for e in (row.values_error, row.gradient_error) if not math.isnan(e))


def draw_cases(
    groups: Mapping[Any, Sequence[PassRow]],
    path: Path,
    *,
    title: str,
    head: Callable[[Any], str],
    colour: Callable[[PassRow], str],
    above: tuple[str, Callable[[PassRow, Sequence[PassRow]], float]],
    mark: Callable[[PassRow, Sequence[PassRow]], float | None],
    below: tuple[str, Callable[[PassRow, Sequence[PassRow]], float]],
    line: float | None = None,
) -> None:
    """Draws two bars for each contender of a case; `above` (with a mark) and `below` (with a line) say of what."""

    def upper(axes: Any, case: Any, rows: Sequence[PassRow]) -> None:
        shown = {r.contender: [Bar(above[1](r, rows), colour(r), mark=mark(r, rows))] for r in timed_rows(rows)}
        charts.bars(axes, shown)
        axes.set_title(head(case), fontsize=8)

    def lower(axes: Any, case: Any, rows: Sequence[PassRow]) -> None:
        charts.bars(axes, {r.contender: [Bar(below[1](r, rows), colour(r))] for r in timed_rows(rows)}, slanted=True)
        if line is not None:
            axes.axhline(line, **charts.DASHED)

    panels = [partial(part, case=case, rows=rows) for part in (upper, lower) for case, rows in groups.items()]
    figure = figure_of(panels, columns=len(groups), size=(3.1, 3.2), title=title, sharex="col", sharey="row")
    figure.axes[0].set_ylabel(above[0])
    figure.axes[len(groups)].set_ylabel(below[0])
    save(figure, path)
