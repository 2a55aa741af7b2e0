"""Measure the update phase of a step of SDPO, ours beside TRL's on the same tokens: time and peak memory.

    python -m benchmarks.step                     # this machine; half an hour on two cores
    python -m benchmarks.step --quick --output /tmp/quick.json

Writes `results/<device>/step/<date>.json`, `.md` and `.png`. A row's loss and gradients are compared with those of TRL
in the run whose memory is counted, and only then is it timed; the rows of a case take turns. The times mean something
on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.measure import MemoryRow, SpeedRow, _summary, _take_turns, watch_memory
from benchmarks.prefix import compare
from benchmarks.prefix_cases import MODELS, Outcome
from benchmarks.report import RESULTS, Report, _rounded, describe_machine
from benchmarks.step_cases import StepCase, StepContender, StepSetup, cases, contenders, make_setup
from benchmarks.tables import MIB, Table, describe, format_error

# What counts as equal to TRL, of the loss and relative to the norm of all gradients.
EQUAL = {"fp32": 1e-4, "bf16": 0.1}
# With a top-k, the tokens next to the k-th place change it with the last digits of the hidden states (1e-5 of noise
# moves 2 of 1024 rows, and the gradients by 6e-3). The full vocabulary has no such steps, and is held to the above.
EQUAL_TOPK = {"fp32": (1e-3, 0.02), "bf16": (0.1, 0.1)}


@dataclass(kw_only=True)
class StepRow(SpeedRow):
    """A contender in a case; `errors` stays empty, the two errors of a step are fields of their own."""

    group: Any  # a StepCase
    ours: bool
    loss_error: float = math.nan
    gradient_error: float = math.nan
    live_bytes: int | None = None  # the peak of one step beyond weights and inputs, gradients included
    resident_bytes: int | None = None
    gradient_bytes: int = 0


@dataclass(kw_only=True)
class StepReport:
    machine: dict[str, Any]
    rows: list[StepRow] = field(default_factory=list)

    @property
    def general(self) -> Report:
        """What names a machine, in the other suites' words."""
        return Report(machine=self.machine)

    def by_case(self) -> dict[StepCase, list[StepRow]]:
        found: dict[StepCase, list[StepRow]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


def measure_case(setup: StepSetup, chosen: Sequence[StepContender], *, seconds_per_row: float) -> list[StepRow]:
    """Check against the first that runs, then time all; repetitions come to `seconds_per_row`, or the least number."""
    rows = []
    steps: list[tuple[Any, Any]] = []
    exact: Outcome | None = None
    for contender in chosen:
        row = StepRow(group=setup.case, contender=contender.name, ours=contender.ours)
        rows.append(row)
        usage = MemoryRow(group=row.group, contender=row.contender)
        try:
            step = contender.build(setup)
            setup.model.zero_grad()
            with watch_memory(usage, setup.device, compiled=False):
                outcome = step()
        except Exception as error:
            row.reason = _summary(error)
            continue
        row.live_bytes, row.resident_bytes = usage.live_bytes, usage.resident_bytes
        row.gradient_bytes = sum(gradient.nbytes for gradient in outcome.gradients.values())
        if exact is None:
            exact = outcome
        else:
            row.loss_error, row.gradient_error = compare(outcome, exact)
            row.reason = _difference(row)
        del outcome
        if row.reason is None:
            steps.append((row, step))
    exact = None
    if steps:
        _take_turns(steps, setup.device, seconds_per_row)
    return rows


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
            f"{row.median * 1e3:.0f} ms" if row.median >= 0.1 else f"{row.median * 1e3:.1f} ms",
            "–" if math.isnan(row.spread) else f"{row.spread:.0%}",
            str(len(row.seconds)),
            _ratio(base.median / row.median if base else math.nan, "×"),
            "–" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f}",
            _ratio(_memory_share(row, base)),
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
    share = _memory_share(smallest, small)
    if not math.isnan(share):
        notes.append(f"The smallest of ours, {smallest.contender}: {share:.2f} of {small.contender}'s peak.")
    return notes


def _ratio(value: float, unit: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:.2f}{unit}"


def _memory_share(row: StepRow, base: StepRow | None) -> float:
    if base is None or not base.live_bytes or row.live_bytes is None:
        return math.nan
    return row.live_bytes / base.live_bytes


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
            cells.append(_ratio(_memory_share(row, base)) if row else "–")
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


def save(report: StepReport, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(asdict(row))) for row in report.rows)
    path.write_text(f'{{\n"machine": {json.dumps(report.machine)},\n"rows": [\n{lines}\n]\n}}\n')


def load(path: Path) -> StepReport:
    stored = json.loads(path.read_text())
    report = StepReport(machine=stored["machine"])
    for entry in stored["rows"]:
        entry |= {name: math.nan for name in ("loss_error", "gradient_error") if entry[name] is None}
        report.rows.append(StepRow(**entry | {"group": StepCase(**entry["group"])}))
    return report


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


def run(device: str, *, quick: bool, seconds: float, console: Console, partial: Path) -> None:
    """Saved to `partial` after every case, so that an interruption does not lose it."""
    report = StepReport(machine=describe_machine(device))
    planned = cases(device, quick=quick)
    for number, case in enumerate(planned, start=1):
        began = time.perf_counter()
        rows = measure_case(make_setup(case, device), contenders(case), seconds_per_row=0.0 if quick else seconds)
        report.rows += rows
        timed = sum(not row.reason for row in rows)
        console.print(
            f"[{number}/{len(planned)}] {case}: {timed} of {len(rows)} rows timed, {time.perf_counter() - began:.0f} s"
        )
        save(report, partial)
        gc.collect()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    started = time.perf_counter()
    machine = Report(machine=describe_machine(options.device))
    path = options.output or RESULTS / machine.device / "step" / f"{machine.machine['date']}.json"
    run(options.device, quick=options.quick, seconds=options.seconds, console=console, partial=path)
    report = load(path)  # every table shows the numbers that are on disk
    path.with_suffix(".md").write_text(markdown(report))
    save_plot(report, path.with_suffix(".png"))
    terminal = Console()
    if not terminal.is_terminal:
        terminal = Console(width=160)
    for table in [*(case_table(case, rows) for case, rows in report.by_case().items()), overview(report)]:
        table.print(terminal)
    written = (str(path.with_suffix(suffix)) for suffix in (".json", ".md", ".png"))
    console.print(f"{time.perf_counter() - started:.0f} s; wrote {', '.join(written)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all work?")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row, two or three runs at least")
    parser.add_argument("--threads", type=int, help="torch's threads; by default one per core")
    parser.add_argument("--output", type=Path, help="the JSON file; .md and .png are put beside it")
    return parser


if __name__ == "__main__":
    main()
