"""The suite `step`: the update phase of a step of SDPO, ours beside TRL's on the same tokens, time and peak memory.

    run(Options(suite="step"))                     # this machine; half an hour on two cores
    run(Options(suite="step", model="qwen3-0.6b", shapes=("L=2,G=4",)))

A row's loss and gradients are compared with those of TRL in the run whose memory is counted, and only then is it timed;
the rows of a case take turns, and the limits with them. The times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console

from ..prefix import Plan, cost
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
from .running import Run, publish, start
from .step_cases import (
    StepCase,
    StepContender,
    StepSetup,
    cases,
    chosen_cases,
    config_of,
    contenders,
    make_setup,
)
from .tables import MIB, Table, describe, format_error, why

SECONDS = 20.0
# What counts as equal to TRL, of the loss and relative to the norm of all gradients.
EQUAL = {"fp32": 1e-4, "bf16": 0.1}
# With a top-k, the tokens next to the k-th place change it with the last digits of the hidden states (1e-5 of noise
# moves 2 of 1024 rows, and the gradients by 6e-3). The full vocabulary has no such steps, and is held to the above.
EQUAL_TOPK = {"fp32": (1e-3, 0.02), "bf16": (0.1, 0.1)}


@dataclass(kw_only=True)
class StepRow(PassRow):
    """`group` is a StepCase (or, in the suite `trainer`, a TrainerCase)."""

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

    limits = limit_rows(setup.case, setup.model.config, setup.plan(), setup.device)
    check_and_time(candidates(), judge, setup.device, seconds_per_row=seconds_per_row, limits=limits)
    return rows + [row for row, _ in limits]


def limit_rows(
    case: Any, config: Any, planned: Plan, device: torch.device, *, teacher_shares: bool = True
) -> list[tuple[StepRow, Products]]:
    """The matrix products of a case alone, each token's prompt shared, and with every completion on its own."""
    counted = cost(planned, config, teacher_shares=teacher_shares)
    passes = [counted.student, *([counted.teacher] if counted.teacher else [])]
    found = []
    for name in LIMITS:
        tokens = [one.tokens if name == SHARED else one.naive_tokens for one in passes]
        products = Products.of(
            config,
            student_tokens=tokens[0],
            teacher_tokens=sum(tokens[1:]),
            rows=planned.num_rows,
            dtype=case.dtype,
            device=device,
        )
        found.append((StepRow(group=case, contender=name, ours=False), products))
    return found


def _built(contender: StepContender, setup: StepSetup) -> Step:
    step = contender.build(setup)
    setup.model.zero_grad()
    return step


def judge(row: StepRow, outcome: Outcome, exact: Outcome) -> str | None:
    """Note how far an outcome is from TRL's, and say so if that is more than rounding."""
    row.loss_error, row.gradient_error = compare(outcome, exact)
    return _difference(row)


def tolerance(case: Any) -> tuple[float, float]:
    """Of the loss and of the gradients, for a case with a `topk` and a `dtype`."""
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
    return next((row for row in rows if not row.ours and not row.reason and row.contender not in LIMITS), None)


def limit(rows: Sequence[StepRow]) -> StepRow | None:
    """The products alone with everything shared; None in results from before they were timed."""
    return next((row for row in rows if row.contender == SHARED and row.seconds), None)


def case_table(case: Any, rows: Sequence[StepRow]) -> Table:
    """All there is to know about one case."""
    base, least = reference(rows), limit(rows)
    whose = "of TRL's" if base is None or base.contender.startswith("TRL") else f"of {base.contender}'s"
    table = Table(
        f"{str(case)[0].upper()}{str(case)[1:]}",
        ("contender", "median", "spread", "runs", "times faster", "peak MiB", whose, "process MiB", "error"),
    )
    if least is not None:
        table.columns = (*table.columns, "of the matmuls")
    for row in rows:
        if row.reason:
            table.notes.append(f"{row.contender}: {why(row.reason)}")
            continue
        if row.ours:
            table.ours.add(len(table.rows))
        errors = [format_error(e) for e in (row.loss_error, row.gradient_error) if not math.isnan(e)]
        table.add(
            row.contender,
            milliseconds(row),
            "–" if math.isnan(row.spread) else f"{row.spread:.0%}",
            str(len(row.seconds)),
            ratio(base.median / row.median if base else math.nan, "×"),
            "–" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f}",
            ratio(memory_share(row, base)),
            "–" if row.resident_bytes is None else f"{row.resident_bytes / MIB:.0f}",
            " / ".join(errors),
            *([] if least is None else [f"{row.median / least.median:.2f}×"]),
        )
    gradients = max((row.gradient_bytes for row in rows), default=0)
    table.notes.append(f"The parameters' gradients are {gradients / MIB:.0f} MiB of every peak.")
    table.notes += _best(rows)
    return table


def _best(rows: Sequence[StepRow]) -> list[str]:
    """TRL's batch is neither its fastest setting nor its smallest: what is left against the best of each."""
    timed = [row for row in rows if not row.reason and row.contender not in LIMITS]
    theirs, ours = ([row for row in timed if row.ours == mine] for mine in (False, True))
    if not theirs or not ours:
        return []
    fast, fastest = (min(some, key=lambda row: row.median) for some in (theirs, ours))
    small, smallest = (min(some, key=lambda row: row.live_bytes or math.inf) for some in (theirs, ours))
    notes = [f"The fastest of ours, {fastest.contender}: {fast.median / fastest.median:.2f}× {fast.contender}'s speed."]
    share = memory_share(smallest, small)
    if not math.isnan(share):
        notes.append(f"The smallest of ours, {smallest.contender}: {share:.2f} of {small.contender}'s peak.")
    return notes


def ratio(value: float, unit: str = "") -> str:
    """For a cell."""
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
            cells.append(ratio(base.median / row.median) if row and base else "–")
            cells.append(ratio(memory_share(row, base)) if row else "–")
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
    sizes = "; ".join(f"{name}: {size_of(name)}".partition(" (")[0] for name in names)
    vocabularies = ", ".join(f"{size_of(name).step_vocab:,}" for name in names)
    return f"{sizes}, here {vocabularies}; random weights, sdpa attention."


def markdown(report: StepReport) -> str:
    """The whole report as a file beside its JSON."""
    tables = [overview(report), *(case_table(case, rows) for case, rows in report.by_case().items())]
    head = ["# Benchmark of a step's update phase", describe(report.general), describe_models(report)]
    return "\n\n".join([*head, *(table.markdown() for table in tables)]) + "\n"


def load(path: Path) -> StepReport:
    return load_rows(path, StepRow, StepCase)


def save_plot(
    report: StepReport, path: Path, *, title: str = "Update phase of SDPO", head: Callable[[Any], str] | None = None
) -> list[Path]:
    """Per case a bar for each contender's seconds, the limit as a line, and its peak beneath; `head` names a case."""
    from .plot import plt

    groups = report.by_case()
    figure, axes = plt.subplots(2, len(groups), figsize=(1 + 3.4 * len(groups), 6.4), squeeze=False, sharey="row")
    for (upper, lower), (case, rows) in zip(axes.T, groups.items(), strict=True):
        timed = [row for row in rows if not row.reason and row.contender not in LIMITS]
        colours = ["#0b6e99" if row.ours else "#8c8c8c" for row in timed]
        upper.bar(range(len(timed)), [row.median for row in timed], color=colours)
        upper.set_title(_head(case) if head is None else head(case), fontsize=8)
        least = limit(rows)
        if least is not None:
            upper.axhline(least.median, color="black", linewidth=0.8, linestyle="--")
        upper.set_xticks([])
        lower.bar(range(len(timed)), [(row.live_bytes or 0) / MIB for row in timed], color=colours)
        lower.set_xticks(range(len(timed)), [row.contender for row in timed], rotation=60, ha="right", fontsize=8)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("peak MiB")
    figure.suptitle(f"{title}, {report.machine['name']}", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def _head(case: StepCase) -> str:
    sizes = f"P={case.prompt} C={case.context} R={case.completion} G={case.completions}"
    return f"{case.objective}\n{case.contexts}\n{sizes}\n{case.model}, {case.dtype}"


def run(options: Options, *, progress: Console | None = None) -> Path:
    """Measure, save, show; returns the path of the JSON. Raises `ArgumentError`."""
    this = start(options, seconds=SECONDS, progress=progress)
    run_cases(this, planned_cases(options, this.device), partial(_measure, this), title=str)
    report = load(this.path)  # every table shows the numbers that are on disk
    publish(
        this,
        markdown=markdown(report),
        save_plots=lambda: save_plot(report, this.path.with_suffix(".png")),
        tables=[*(case_table(case, rows) for case, rows in report.by_case().items()), overview(report)],
    )
    return this.path


def planned_cases(options: Options, device: str) -> list[StepCase]:
    """The suite's own, or those of a model and of shapes."""
    if options.chosen:
        return chosen_cases(options, device)
    found = cases(device, quick=options.quick)
    return [replace(case, dtype=options.dtype or case.dtype) for case in found]


def _measure(this: Run, case: StepCase) -> list[StepRow]:
    # Weights, their gradients, and the copy that TRL's teacher is.
    needed = model_bytes(config_of(case.model), case.dtype, gradients=True, copies=1)
    reason = too_large(needed, free_bytes(torch.device(this.device)))
    if reason is not None:
        return [StepRow(group=case, contender=one.name, ours=one.ours, reason=reason) for one in contenders(case)]
    return measure_case(make_setup(case, this.device), contenders(case), seconds_per_row=this.seconds)


__all__ = [
    "EQUAL",
    "StepReport",
    "StepRow",
    "case_table",
    "describe_models",
    "judge",
    "limit",
    "limit_rows",
    "load",
    "markdown",
    "measure_case",
    "overview",
    "planned_cases",
    "ratio",
    "reference",
    "run",
    "save_plot",
    "tolerance",
]
