"""Measure the update phase of a step of SDPO, ours beside TRL's on the same tokens: time and peak memory.

    python -m benchmarks.step                     # this machine; half an hour on two cores
    python -m benchmarks.step --quick --output /tmp/quick.json

Writes `results/<device>/step/<date>.json`, `.md` and `.png`. A row's loss and gradients are compared with those of TRL
in the run whose memory is counted, and only then is it timed; the rows of a case take turns. The times mean something
on a machine that does nothing else.
"""

from __future__ import annotations

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
from benchmarks.prefix_cases import MODELS, Outcome, Step
from benchmarks.report import RESULTS, Report, describe_machine
from benchmarks.step_cases import StepCase, StepContender, StepSetup, cases, contenders, make_setup
from benchmarks.tables import MIB, Table, describe, format_error

# What counts as equal to TRL, of the loss and relative to the norm of all gradients.
EQUAL = {"fp32": 1e-4, "bf16": 0.1}
# With a top-k, the tokens next to the k-th place change it with the last digits of the hidden states (1e-5 of noise
# moves 2 of 1024 rows, and the gradients by 6e-3). The full vocabulary has no such steps, and is held to the above.
EQUAL_TOPK = {"fp32": (1e-3, 0.02), "bf16": (0.1, 0.1)}


@dataclass(kw_only=True)
class StepRow(PassRow):
    """`group` is a StepCase."""

    ours: bool
    loss_error: float = math.nan


StepReport: TypeAlias = PassReport[StepRow]


def measure_case(setup: StepSetup, chosen: Sequence[StepContender], *, seconds_per_row: float) -> list[StepRow]:
    """Check against the first that runs, then time all; repetitions come to `seconds_per_row`, or the least number."""
    rows: list[StepRow] = []

    def candidates() -> Iterator[tuple[StepRow, Callable[[], Step]]]:
        for contender in chosen:
            rows.append(StepRow(group=setup.case, contender=contender.name, ours=contender.ours))
            yield rows[-1], partial(_built, contender, setup)

    check_and_time(candidates(), _judge, setup.device, seconds_per_row=seconds_per_row)
    return rows


def _built(contender: StepContender, setup: StepSetup) -> Step:
    step = contender.build(setup)
    setup.model.zero_grad()
    return step


def _judge(row: StepRow, outcome: Outcome, exact: Outcome) -> str | None:
    row.loss_error, row.gradient_error = compare(outcome, exact)
    return _difference(row)


def tolerance(case: StepCase) -> tuple[float, float]:
    """Of the loss and of the gradients."""
    return (EQUAL[case.dtype],) * 2 if case.topk is None else EQUAL_TOPK[case.dtype]


def _difference(row: StepRow) -> str | None:
    loss, gradient = tolerance(row.group)
    if not row.loss_error <= loss:
        return f"its loss differs from TRL's by {row.loss_error:.1e}"
    if not row.gradient_error <= gradient:
        return f"its gradients differ from TRL's by {row.gradient_error:.1e}"
    return None


def reference(rows: Sequence[StepRow]) -> StepRow | None:
    """What times and bytes are relative to: TRL's batch, or the first of TRL's rows that ran."""
    return next((row for row in rows if not row.ours and not row.reason), None)


def case_table(case: StepCase, rows: Sequence[StepRow]) -> Table:
    """All there is to know about one case."""
    table = Table(
        f"{str(case)[0].upper()}{str(case)[1:]}",
        ("contender", "median", "spread", "runs", "times faster", "peak MiB", "of TRL's", "process MiB", "error"),
    )
    base = reference(rows)
    for row in rows:
        if row.reason:
            table.notes.append(f"{row.contender}: not timed, {row.reason}")
            continue
        if row.ours:
            table.ours.add(len(table.rows))
        errors = [format_error(e) for e in (row.loss_error, row.gradient_error) if not math.isnan(e)]
        table.add(
            row.contender,
            milliseconds(row),
            "–" if math.isnan(row.spread) else f"{row.spread:.0%}",
            str(len(row.seconds)),
            _ratio(base.median / row.median if base else math.nan, "×"),
            "–" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f}",
            _ratio(memory_share(row, base)),
            "–" if row.resident_bytes is None else f"{row.resident_bytes / MIB:.0f}",
            " / ".join(errors),
        )
    gradients = max((row.gradient_bytes for row in rows), default=0)
    table.notes.append(f"The parameters' gradients are {gradients / MIB:.0f} MiB of every peak.")
    table.notes += _best(rows)
    return table


def _best(rows: Sequence[StepRow]) -> list[str]:
    """TRL's batch is neither its fastest setting nor its smallest: what is left against the best of each."""
    theirs, ours = ([row for row in rows if row.ours == mine and not row.reason] for mine in (False, True))
    if not theirs or not ours:
        return []
    fast, fastest = (min(some, key=lambda row: row.median) for some in (theirs, ours))
    small, smallest = (min(some, key=lambda row: row.live_bytes or math.inf) for some in (theirs, ours))
    notes = [f"The fastest of ours, {fastest.contender}: {fast.median / fastest.median:.2f}× {fast.contender}'s speed."]
    share = memory_share(smallest, small)
    if not math.isnan(share):
        notes.append(f"The smallest of ours, {smallest.contender}: {share:.2f} of {small.contender}'s peak.")
    return notes


def _ratio(value: float, unit: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:.2f}{unit}"


def overview(report: StepReport) -> Table:
    """All cases at a glance: a line per contender, two columns per case."""
    groups = report.by_case()
    heads = [f"{case.objective}, {case.contexts}, {case.model}" for case in groups]
    columns = [f"{head}: {what}" for head in heads for what in ("times faster", "peak of TRL's")]
    table = Table("Update phase of a step of SDPO, against TRL's batch", ("contender", *columns))
    for contender in dict.fromkeys(row.contender for row in report.rows):
        cells = []
        for rows in groups.values():
            row = next((row for row in rows if row.contender == contender and not row.reason), None)
            base = reference(rows)
            cells.append(_ratio(base.median / row.median) if row and base else "–")
            cells.append(_ratio(memory_share(row, base)) if row else "–")
        if any(row.ours for row in report.rows if row.contender == contender):
            table.ours.add(len(table.rows))
        table.add(contender, *cells)
    bases = [reference(rows) for rows in groups.values()]
    table.add("TRL, seconds and MiB", *(cell for base in bases for cell in _absolute(base)))
    return table


def _absolute(base: StepRow | None) -> tuple[str, str]:
    if base is None:
        return "–", "–"
    return f"{base.median:.2f}", "–" if base.live_bytes is None else f"{base.live_bytes / MIB:.0f}"


def describe_models(report: StepReport) -> str:
    names = dict.fromkeys(case.model for case in report.by_case())
    sizes = "; ".join(f"{name}: {MODELS[name]}".partition(" (")[0] for name in names)
    vocabularies = ", ".join(f"{MODELS[name].step_vocab:,}" for name in names)
    return f"{sizes}, here {vocabularies}; random weights, sdpa attention."


def markdown(report: StepReport) -> str:
    """The whole report as a file beside its JSON."""
    tables = [overview(report), *(case_table(case, rows) for case, rows in report.by_case().items())]
    head = ["# Benchmark of a step's update phase", describe(report.general), describe_models(report)]
    return "\n\n".join([*head, *(table.markdown() for table in tables)]) + "\n"


def load(path: Path) -> StepReport:
    return load_rows(path, StepRow, StepCase)


def save_plot(report: StepReport, path: Path) -> None:
    """Per case a bar for each contender's seconds, and its peak beneath."""
    from benchmarks.plot import plt

    groups = report.by_case()
    figure, axes = plt.subplots(2, len(groups), figsize=(1 + 3.4 * len(groups), 6.4), squeeze=False, sharey="row")
    for (upper, lower), (case, rows) in zip(axes.T, groups.items(), strict=True):
        timed = [row for row in rows if not row.reason]
        colours = ["#0b6e99" if row.ours else "#8c8c8c" for row in timed]
        upper.bar(range(len(timed)), [row.median for row in timed], color=colours)
        upper.set_title(f"{case.objective}\n{case.contexts}\n{case.model}, {case.dtype}", fontsize=8)
        upper.set_xticks([])
        lower.bar(range(len(timed)), [(row.live_bytes or 0) / MIB for row in timed], color=colours)
        lower.set_xticks(range(len(timed)), [row.contender for row in timed], rotation=60, ha="right", fontsize=8)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("peak MiB")
    sizes = next(iter(groups))
    figure.suptitle(
        f"Update phase of SDPO, {report.machine['name']}: P={sizes.prompt} C={sizes.context} R={sizes.completion} "
        f"G={sizes.completions}",
        x=0.01,
        ha="left",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(
        prog="python -m benchmarks.step",
        description=__doc__.partition("\n")[0],
        quick="a tiny model",
        seconds=20.0,
        output="results/<device>/step/<date>.json",
    ).parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    started = time.perf_counter()
    machine = Report(machine=describe_machine(options.device))
    path = options.output or RESULTS / machine.device / "step" / f"{machine.machine['date']}.json"
    seconds = 0.0 if options.quick else options.seconds
    run_cases(
        cases(options.device, quick=options.quick),
        lambda case: measure_case(make_setup(case, options.device), contenders(case), seconds_per_row=seconds),
        machine=machine.machine,
        title=str,
        console=console,
        path=path,
    )
    report = load(path)  # every table shows the numbers that are on disk
    publish(
        path,
        markdown=markdown(report),
        save_plot=partial(save_plot, report),
        tables=[*(case_table(case, rows) for case, rows in report.by_case().items()), overview(report)],
        started=started,
        console=console,
    )


if __name__ == "__main__":
    main()
