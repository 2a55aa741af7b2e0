"""The suite `trainer`: one optimizer step's update by TRL's trainers and by the fused ones, on the same tokens.

    run(Options(suite="trainer"))                  # this machine; ten minutes on two cores
    run(Options(suite="trainer", quick=True))

Rows, checks and limits are those of the suite `step`: loss and gradients are compared with TRL's in the run whose
memory is counted, and only then is a row timed; what is timed is in `trainer_cases`. The peak has the activations,
gradients and temporaries of one update, and not what stays between updates: weights, teachers, AdamW's moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from .estimate import model_bytes, trainer_bytes
from .live_memory import free_bytes, too_large
from .models import size_of
from .options import Options
from .passes import Step, check_and_time, memory_share, milliseconds, run_cases
from .passes import load as load_rows
from .running import Run, publish, start
from .step import StepReport, StepRow, case_table, judge, limit, limit_rows, ratio, reference, save_plot
from .step_cases import config_of
from .tables import MIB, Table, describe
from .trainer_cases import (
    TrainerCase,
    TrainerContender,
    TrainerSetup,
    cases,
    chosen_cases,
    contenders,
    make_trainer_setup,
)

SECONDS = 20.0


def measure_case(setup: TrainerSetup, chosen: Sequence[TrainerContender], *, seconds_per_row: float) -> list[StepRow]:
    """Check against the first that runs, then time all; repetitions come to `seconds_per_row`, or the least number."""
    rows: list[StepRow] = []

    def candidates() -> Iterator[tuple[StepRow, Callable[[], Step]]]:
        for contender in chosen:
            row = StepRow(group=setup.case, contender=contender.name, ours=contender.ours)
            if not contender.ours:
                row.reason = too_large(trainer_bytes(setup.case, setup.model.config), free_bytes(setup.device))
            rows.append(row)
            yield row, partial(_built, contender, setup)

    # A teacher that is another model shares nothing with the student.
    limits = limit_rows(
        setup.case, setup.model.config, setup.plan(), setup.device, teacher_shares=setup.case.has_context
    )
    check_and_time(candidates(), judge, setup.device, seconds_per_row=seconds_per_row, limits=limits)
    return rows + [row for row, _ in limits]


def _built(contender: TrainerContender, setup: TrainerSetup) -> Step:
    step = contender.build(setup)
    setup.model.zero_grad()
    return step


def overview(report: StepReport) -> Table:
    """All cases at a glance, a line for each row that was timed."""
    table = Table(
        "One optimizer step's update, sampling left out",
        ("case", "trainer", "seconds", "times faster", "peak MiB", "of TRL's", "of the matmuls"),
        text_columns=2,
    )
    for case, rows in report.by_case().items():
        base, least = reference(rows), limit(rows)
        for row in rows:
            if row.reason:
                table.notes.append(f"{case.trainer}, {row.contender}: {row.reason}")
                continue
            if row.ours:
                table.ours.add(len(table.rows))
            table.add(
                f"{case.trainer}, {case.objective}",
                row.contender,
                milliseconds(row) if row.median < 1 else f"{row.median:.2f}",
                ratio(base.median / row.median, "×") if base else "–",
                "–" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f}",
                ratio(memory_share(row, base)),
                ratio(row.median / least.median, "×") if least else "–",
            )
    return table


def describe_models(report: StepReport) -> str:
    """What was trained, and on which sizes."""
    names = dict.fromkeys(case.model for case in report.by_case())
    sizes = "; ".join(f"{name}: {size_of(name)}".partition(", vocabulary")[0] for name in names)
    vocabularies = ", ".join(f"{size_of(name).step_vocab:,}" for name in names)
    shapes = dict.fromkeys(str(case).partition(", P=")[2].partition(" ")[0] for case in report.by_case())
    prompts = ", ".join(f"P={prompt}" for prompt in shapes)
    return f"{sizes}, vocabulary {vocabularies}, {prompts}; random weights, sdpa attention, AdamW."


def markdown(report: StepReport) -> str:
    """The whole report as a file beside its JSON."""
    tables = [overview(report), *(case_table(case, rows) for case, rows in report.by_case().items())]
    head = ["# Benchmark of whole trainers", describe(report.general), describe_models(report)]
    return "\n\n".join([*head, *(table.markdown() for table in tables)]) + "\n"


def load(path: Path) -> StepReport:
    """Of the JSON of a run."""
    return load_rows(path, StepRow, TrainerCase)


def run(options: Options, *, progress: Console | None = None) -> Path:
    """Measure, save, show; returns the path of the JSON. Raises `ArgumentError`."""
    this = start(options, seconds=SECONDS, progress=progress)
    run_cases(this, planned_cases(options, this.device), partial(_measure, this), title=str)
    report = load(this.path)  # every table shows the numbers that are on disk
    publish(
        this,
        markdown=markdown(report),
        save_plots=lambda: save_plot(
            report, this.path.with_suffix(".png"), title="An optimizer step's update", head=_head
        ),
        tables=[*(case_table(case, rows) for case, rows in report.by_case().items()), overview(report)],
    )
    return this.path


def planned_cases(options: Options, device: str) -> list[TrainerCase]:
    """The suite's own, or those of a model and of shapes; of the trainers that `peers` names."""
    found = chosen_cases(options, device) if options.chosen else cases(device, quick=options.quick)
    wanted = None if options.peers is None else {name.lower() for name in options.peers}
    return [
        replace(case, dtype=options.dtype or case.dtype)
        for case in found
        if wanted is None or case.trainer.lower() in wanted
    ]


def _measure(this: Run, case: TrainerCase) -> list[StepRow]:
    # Weights, gradients, two teachers' copies and AdamW's moments.
    needed = model_bytes(config_of(case.model), case.dtype, gradients=True, copies=2, moments=True)
    reason = too_large(needed, free_bytes(torch.device(this.device)))
    if reason is not None:
        return [StepRow(group=case, contender=one.name, ours=one.ours, reason=reason) for one in contenders(case)]
    return measure_case(make_trainer_setup(case, this.device), contenders(case), seconds_per_row=this.seconds)


def _head(case: TrainerCase) -> str:
    return str(case).replace(", ", "\n")


__all__ = [
    "describe_models",
    "load",
    "markdown",
    "measure_case",
    "overview",
    "planned_cases",
    "run",
]
