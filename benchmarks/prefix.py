"""Measure the shared-prefix scheme: the student's pass, the teacher's, the whole step, each naive and shared.

    python -m benchmarks.prefix                     # this machine; ten minutes on two cores
    python -m benchmarks.prefix --everything --seconds 0    # the grid, each row timed once: an hour on a CPU
    python -m benchmarks.prefix --quick --output /tmp/quick.json

Writes `results/<device>/prefix/<date>.json`, `.md` and `.png`; the grid into a folder `grid` beside them. A row is
checked against naive in the step whose memory is counted, and only then timed; the rows of a case take turns.
"Allowed" is the speed-up by the FLOPs that are left (`sdcore.prefix.cost`), "reached" the measured one's share of it.
The times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console

from benchmarks.command import parser
from benchmarks.passes import (
    PassReport,
    PassRow,
    check_and_time,
    compare,
    memory_share,
    milliseconds,
    publish,
    run_cases,
)
from benchmarks.passes import load as load_rows
from benchmarks.prefix_cases import (
    MODELS,
    STEP,
    STUDENT,
    WORKS,
    Case,
    Contender,
    Outcome,
    Setup,
    Step,
    cases,
    contenders,
    make_setup,
)
from benchmarks.report import RESULTS, Report, describe_machine
from benchmarks.tables import MIB, Table, describe, format_error

# What counts as equal to naive, relative to the norm of the states and of all gradients.
EQUAL = {"fp32": 1e-4, "bf16": 0.05}
MOST_OF_FREE = 0.7
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

    check_and_time(candidates(), _judge, setup.device, seconds_per_row=seconds_per_row)
    return rows


def _left_out(setup: Setup, contender: Contender) -> str | None:
    """Why a contender is not run: what it keeps for backward would not fit."""
    if setup.case.work not in (STUDENT, STEP):
        return None
    kept, free = setup.cost(contender).student.kept_bytes, _free_bytes(setup.device)
    if kept > MOST_OF_FREE * free:
        return f"it would keep {kept / 2**30:.1f} GiB for backward, and {free / 2**30:.1f} GiB are free"
    return None


def _free_bytes(device: torch.device) -> float:
    """Of a CPU's memory with what the kernel would give up for it; infinite where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


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
    for row in rows:
        if row.reason:
            table.notes.append(f"{row.contender}: not timed, {row.reason}")
            continue
        gained = speedup(row, rows)
        errors = [format_error(e) for e in (row.values_error, row.gradient_error) if not math.isnan(e)]
        cells = (
            row.contender,
            milliseconds(row),
            "" if math.isnan(row.spread) else f"{row.spread:.0%}",
            str(len(row.seconds)),
            f"{gained:.2f}×",
            f"{row.allowed:.2f}×",
            f"{gained / row.allowed:.0%}",
            "–" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f}",
            f"{_memory_share(row, rows):.2f}",
            " / ".join(errors),
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
    return f"{gained:.2f}" if row.contender in REFERENCES else f"{gained:.2f} ({gained / row.allowed:.0%})"


def _add(table: Table, cells: Sequence[str]) -> None:
    if cells[0] not in (*REFERENCES, "PrefixGrouper-style"):
        table.ours.add(len(table.rows))
    table.add(*cells)


def overviews(report: PrefixReport) -> list[Table]:
    """What the README shows: the speed of everything, the memory of what has a backward."""
    works = [work for work in WORKS if any(case.work == work for case in report.by_case())]
    tables = [overview(work, report) for work in works]
    return tables + [overview(work, report, memory=True) for work in works if not work.startswith("teacher")]


def describe_models(report: PrefixReport) -> str:
    names = dict.fromkeys(case.model for case in report.by_case())
    return "; ".join(f"{name}: {MODELS[name]}" for name in names) + "; random weights, sdpa attention."


def markdown(report: PrefixReport) -> str:
    """The whole report as a file beside its JSON."""
    tables = overviews(report) + [case_table(case, rows) for case, rows in report.by_case().items()]
    head = ["# Benchmark of the shared-prefix scheme", describe(report.general), describe_models(report)]
    return "\n\n".join([*head, *(table.markdown() for table in tables)]) + "\n"


def load(path: Path) -> PrefixReport:
    return load_rows(path, PrefixRow, Case)


def save_plot(report: PrefixReport, path: Path) -> None:
    """Per case a bar for each contender's speed-up, a mark for what the FLOPs allow, and the peak beneath.

    Of more than `MOST_PANELS` cases only the student's passes with the most completions.
    """
    from benchmarks.plot import plt

    groups = report.by_case()
    if len(groups) > MOST_PANELS:
        most = max(case.completions for case in groups)
        wanted = [case for case in groups if case.work == STUDENT and case.completions == most][:MOST_PANELS]
        groups = {case: groups[case] for case in wanted}
    figure, axes = plt.subplots(2, len(groups), figsize=(1 + 2.6 * len(groups), 6.4), squeeze=False, sharey="row")
    for (upper, lower), (case, rows) in zip(axes.T, groups.items(), strict=True):
        timed = [row for row in rows if not row.reason]
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


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    started = time.perf_counter()
    machine = Report(machine=describe_machine(options.device))
    folder = RESULTS / machine.device / "prefix" / ("grid" if options.everything else "")
    path = options.output or folder / f"{machine.machine['date']}.json"
    seconds = 0.0 if options.quick else options.seconds
    run_cases(
        cases(options.device, quick=options.quick, everything=options.everything),
        lambda case: measure_case(make_setup(case, options.device), contenders(case), seconds_per_row=seconds),
        machine=machine.machine,
        title=lambda case: f"{case.work}, {case}",
        console=console,
        path=path,
    )
    report = load(path)  # every table shows the numbers that are on disk
    publish(
        path,
        markdown=markdown(report),
        save_plot=partial(save_plot, report),
        tables=[*(case_table(case, rows) for case, rows in report.by_case().items()), *reversed(overviews(report))],
        started=started,
        console=console,
    )


def _parser() -> argparse.ArgumentParser:
    made = parser(
        prog="python -m benchmarks.prefix",
        description=__doc__.partition("\n")[0],
        quick="a tiny model",
        seconds=3.0,
        output="results/<device>/prefix/<date>.json",
    )
    made.add_argument("--everything", action="store_true", help="the grid of sizes: an hour on a CPU, with --seconds 0")
    return made


if __name__ == "__main__":
    main()
