"""The suite `prefix`: the student's pass, the teacher's, the whole step, each naive and with shared prefixes.

    run(Options(suite="prefix"))                                  # this machine; ten minutes on two cores
    run(Options(suite="prefix", everything=True, seconds=0))      # the grid, each row timed once: an hour on a CPU
    run(Options(suite="prefix", model="qwen3-0.6b", shapes=("L=2",)))

A row is checked against naive in the step whose memory is counted, and only then timed; the rows of a case take turns.
"Allowed" is the speed-up by the FLOPs that are left (`sdcore.prefix.cost`), "reached" the measured one's share of it.
The times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console

from ..prefix import cost
from .estimate import model_bytes
from .limit import LIMITS, SHARED, Products
from .live_memory import free_bytes, too_large
from .models import size_of
from .options import Options
from .passes import (
    Outcome,
    PassReport,
    PassRow,
    Step,
    check_and_time,
    compare,
    memory_share,
    milliseconds,
    run_cases,
)
from .passes import load as load_rows
from .prefix_cases import (
    STEP,
    STUDENT,
    WORKS,
    Case,
    Contender,
    Setup,
    cases,
    chosen_cases,
    config_of,
    contenders,
    make_setup,
)
from .running import Run, publish, start
from .tables import MIB, Table, describe, format_error, why

# What counts as equal to naive, relative to the norm of the states and of all gradients.
EQUAL = {"fp32": 1e-4, "bf16": 0.05}
SECONDS = 3.0
MOST_PANELS = 10
REFERENCES = ("naive batch", "naive loop")


@dataclass(kw_only=True)
class PrefixRow(PassRow):
    """`group` is a Case."""

    allowed: float = math.nan  # the speed-up over naive that the FLOPs allow
    values_error: float = math.nan  # of the states, or of the loss


PrefixReport: TypeAlias = PassReport[PrefixRow]


def measure_case(setup: Setup, chosen: Sequence[Contender], *, seconds_per_row: float) -> list[PrefixRow]:
    """Check against the first that runs, then time all; repetitions come to `seconds_per_row`, or the least number."""
    rows: list[PrefixRow] = []

    def candidates() -> Iterator[tuple[PrefixRow, Callable[[], Step]]]:
        for contender in chosen:
            row = PrefixRow(
                group=setup.case,
                contender=contender.name,
                allowed=setup.allowed_speedup(contender),
                reason=_left_out(setup, contender),
            )
            rows.append(row)
            yield row, partial(contender.build, setup)

    limits = limit_rows(setup)
    check_and_time(candidates(), _judge, setup.device, seconds_per_row=seconds_per_row, limits=limits)
    return rows + [row for row, _ in limits]


def limit_rows(setup: Setup) -> list[tuple[PrefixRow, Products]]:
    """The matrix products of the case's pass alone: tokens shared as far as any contender does, and not at all."""
    counted = cost(setup.plan, setup.body.config, teacher_shares=True)
    student = counted.student if setup.case.work in (STUDENT, STEP) else None
    teacher = counted.teacher if setup.case.work != STUDENT else None
    found = []
    for name in LIMITS:
        tokens = [
            0 if one is None else one.tokens if name == SHARED else one.naive_tokens for one in (student, teacher)
        ]
        products = Products.of(
            setup.body.config,
            student_tokens=tokens[0],
            teacher_tokens=tokens[1],
            rows=setup.plan.num_rows if setup.case.work == STEP else 0,
            dtype=setup.case.dtype,
            device=setup.device,
        )
        found.append((PrefixRow(group=setup.case, contender=name), products))
    return found


def _left_out(setup: Setup, contender: Contender) -> str | None:
    """Why a contender is not run: what it keeps for backward, and the gradients, would not fit."""
    if setup.case.work not in (STUDENT, STEP):
        return None
    gradients = model_bytes(setup.body.config, setup.case.dtype, gradients=False)  # as many as weights
    return too_large(setup.cost(contender).student.kept_bytes + gradients, free_bytes(setup.device))


def not_run(case: Case, reason: str) -> list[PrefixRow]:
    """The rows of a case that is left out as a whole."""
    return [PrefixRow(group=case, contender=one.name, reason=reason) for one in contenders(case)]


def _judge(row: PrefixRow, outcome: Outcome, exact: Outcome) -> str | None:
    row.values_error, row.gradient_error = compare(outcome, exact)
    return _difference(row)


def _difference(row: PrefixRow) -> str | None:
    most = EQUAL[row.group.dtype]
    if not row.values_error <= most:
        return f"differs from naive by {row.values_error:.1e}"
    if row.gradient_error > most:
        return f"gradients differ from naive's by {row.gradient_error:.1e}"
    return None


def reference(rows: Sequence[PrefixRow]) -> PrefixRow | None:
    """What speed-up and memory are relative to: the naive batch, or the loop where the batch did not fit."""
    found = {row.contender: row for row in rows if not row.reason}
    return next((found[name] for name in REFERENCES if name in found), None)


def speedup(row: PrefixRow, rows: Sequence[PrefixRow]) -> float:
    base = reference(rows)
    return base.median / row.median if base is not None and row.seconds else math.nan


def _memory_share(row: PrefixRow, rows: Sequence[PrefixRow]) -> float:
    return memory_share(row, reference(rows))


def case_table(case: Case, rows: Sequence[PrefixRow]) -> Table:
    """All there is to know about one case."""
    table = Table(
        f"{case.work}, {case}",
        ("contender", "median", "spread", "runs", "speed-up", "allowed", "reached", "peak MiB", "of naive", "error"),
    )
    least = next((row for row in rows if row.contender == SHARED and row.seconds), None)
    if least is not None:
        table.columns = (*table.columns, "of the matmuls")
    for row in rows:
        if row.reason:
            table.notes.append(f"{row.contender}: {why(row.reason)}")
            continue
        gained, bounded = speedup(row, rows), not math.isnan(row.allowed)
        errors = [format_error(e) for e in (row.values_error, row.gradient_error) if not math.isnan(e)]
        cells = (
            row.contender,
            milliseconds(row),
            "" if math.isnan(row.spread) else f"{row.spread:.0%}",
            str(len(row.seconds)),
            f"{gained:.2f}×",
            f"{row.allowed:.2f}×" if bounded else "–",
            f"{gained / row.allowed:.0%}" if bounded else "–",
            "–" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f}",
            "–" if row.live_bytes is None else f"{_memory_share(row, rows):.2f}",
            " / ".join(errors),
            *([] if least is None else [f"{row.median / least.median:.2f}×"]),
        )
        _add(table, cells)
    gradients = max(row.gradient_bytes for row in rows)
    if gradients:
        table.notes.append(f"The parameters' gradients are {gradients / MIB:.0f} MiB of every peak.")
    return table


def overview(work: str, report: PrefixReport, *, memory: bool = False) -> Table:
    """One kind of pass at a glance: a line per contender, a column per case."""
    groups = {case: rows for case, rows in report.by_case().items() if case.work == work}
    what = "peak MiB (of naive's)" if memory else "times faster than the naive batch (of what the FLOPs allow)"
    several = len({case.model for case in groups}) > 1
    heads = (str(case) if several else f"{case.sizes} {case.dtype}" for case in groups)
    table = Table(f"{work[0].upper()}{work[1:]}, {what}", ("contender", *heads))
    for contender in dict.fromkeys(row.contender for rows in groups.values() for row in rows):
        cells = []
        for rows in groups.values():
            row = next((row for row in rows if row.contender == contender and not row.reason), None)
            cells.append("–" if row is None else _overview_cell(row, rows, memory))
        if any(cell != "–" for cell in cells):
            _add(table, (contender, *cells))
    if not memory:
        bases = [reference(rows) for rows in groups.values()]
        table.add("naive, seconds", *("–" if base is None else f"{base.median:.2f}" for base in bases))
    return table


def _overview_cell(row: PrefixRow, rows: Sequence[PrefixRow], memory: bool) -> str:
    if memory:
        return "–" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f} ({_memory_share(row, rows):.2f})"
    gained = speedup(row, rows)
    return f"{gained:.2f}" if row.contender in (*REFERENCES, *LIMITS) else f"{gained:.2f} ({gained / row.allowed:.0%})"


def _add(table: Table, cells: Sequence[str]) -> None:
    if cells[0] not in (*REFERENCES, *LIMITS, "PrefixGrouper-style"):
        table.ours.add(len(table.rows))
    table.add(*cells)


def overviews(report: PrefixReport) -> list[Table]:
    """What the README shows: the speed of everything, the memory of what has a backward."""
    works = [work for work in WORKS if any(case.work == work for case in report.by_case())]
    tables = [overview(work, report) for work in works]
    return tables + [overview(work, report, memory=True) for work in works if not work.startswith("teacher")]


def describe_models(report: PrefixReport) -> str:
    names = dict.fromkeys(case.model for case in report.by_case())
    return "; ".join(f"{name}: {size_of(name)}" for name in names) + "; random weights, sdpa attention."


def markdown(report: PrefixReport) -> str:
    """The whole report as a file beside its JSON."""
    tables = overviews(report) + [case_table(case, rows) for case, rows in report.by_case().items()]
    head = ["# Benchmark of the shared-prefix scheme", describe(report.general), describe_models(report)]
    return "\n\n".join([*head, *(table.markdown() for table in tables)]) + "\n"


def load(path: Path) -> PrefixReport:
    return load_rows(path, PrefixRow, Case)


def save_plot(report: PrefixReport, path: Path) -> list[Path]:
    """Per case a bar for each contender's speed-up, a mark for what the FLOPs allow, and the peak beneath.

    Of more than `MOST_PANELS` cases only the student's passes with the most completions.
    """
    from .plot import plt

    groups = report.by_case()
    if len(groups) > MOST_PANELS:
        most = max(case.completions for case in groups)
        wanted = [case for case in groups if case.work == STUDENT and case.completions == most][:MOST_PANELS]
        groups = {case: groups[case] for case in wanted}
    figure, axes = plt.subplots(2, len(groups), figsize=(1 + 2.6 * len(groups), 6.4), squeeze=False, sharey="row")
    for (upper, lower), (case, rows) in zip(axes.T, groups.items(), strict=True):
        timed = [row for row in rows if not row.reason and row.contender not in LIMITS]
        colours = [
            "#8c8c8c" if row.contender in REFERENCES else "#e08a1e" if "style" in row.contender else "#0b6e99"
            for row in timed
        ]
        upper.bar(range(len(timed)), [speedup(row, rows) for row in timed], color=colours)
        upper.scatter(range(len(timed)), [row.allowed for row in timed], marker="_", s=160, color="black", zorder=3)
        upper.set_title(f"{case.work}\n{case.sizes}\n{case.dtype}, {case.model}", fontsize=8)
        lower.bar(range(len(timed)), [_memory_share(row, rows) for row in timed], color=colours)
        lower.axhline(0.2, color="black", linewidth=0.8, linestyle="--")
        lower.set_xticks(range(len(timed)), [row.contender for row in timed], rotation=60, ha="right", fontsize=8)
        upper.set_xticks([])
    axes[0][0].set_ylabel("times faster than naive")
    axes[1][0].set_ylabel("peak bytes / naive's")
    figure.suptitle(
        f"Shared prefixes, {report.machine['name']} (lines: what the FLOPs allow; dashed: a fifth)", x=0.01, ha="left"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def run(options: Options, *, progress: Console | None = None) -> Path:
    """Measure, save, show; returns the path of the JSON. Raises `ArgumentError`."""
    this = start(options, seconds=SECONDS, progress=progress)
    run_cases(this, planned_cases(options, this.device), partial(_measure, this), title=_title)
    report = load(this.path)  # every table shows the numbers that are on disk
    publish(
        this,
        markdown=markdown(report),
        save_plots=lambda: save_plot(report, this.path.with_suffix(".png")),
        tables=[*(case_table(case, rows) for case, rows in report.by_case().items()), *reversed(overviews(report))],
    )
    return this.path


def planned_cases(options: Options, device: str) -> list[Case]:
    """The suite's own, or those of a model and of shapes."""
    if options.chosen:
        return chosen_cases(options, device)
    found = cases(device, quick=options.quick, everything=options.everything)
    if options.dtype is None:
        return found
    return list(dict.fromkeys(replace(case, dtype=options.dtype) for case in found))


def _measure(this: Run, case: Case) -> list[PrefixRow]:
    # Weights, and a frozen teacher's or the gradients of all.
    needed = model_bytes(config_of(case), case.dtype, gradients=True)
    reason = too_large(needed, free_bytes(torch.device(this.device)))
    if reason is not None:
        return not_run(case, reason)
    return measure_case(make_setup(case, this.device), contenders(case), seconds_per_row=this.seconds)


def _title(case: Case) -> str:
    return f"{case.work}, {case}"


__all__ = [
    "EQUAL",
    "PrefixReport",
    "PrefixRow",
    "case_table",
    "describe_models",
    "load",
    "markdown",
    "measure_case",
    "overview",
    "overviews",
    "planned_cases",
    "reference",
    "run",
    "save_plot",
    "speedup",
]
