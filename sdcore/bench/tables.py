"""The tables of a report, once, for the terminal (rich) and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from .live_memory import MemoryRow
from .measure import AccuracyRow
from .peers import SDCORE, SDCORE_RECOMPUTE
from .report import Report
from .shapes import REVERSE_KL, Divergence, Group, Shape
from .timing import FLOORS, SpeedRow

MIB = 1 << 20


@dataclass
class Table:
    """The first `text_columns` are words, the others numbers; `ours` are the rows to set off; `notes` go below."""

    title: str
    columns: Sequence[str]
    text_columns: int = 1
    rows: list[list[str]] = field(default_factory=list)
    ours: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str, contender: str = "") -> None:
        if contender in (SDCORE.name, SDCORE_RECOMPUTE.name):
            self.ours.add(len(self.rows))
        self.rows.append(list(cells))

    def print(self, console: Console) -> None:
        shown = RichTable(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE)
        for number, column in enumerate(self.columns):
            words = number < self.text_columns
            shown.add_column(column, justify="left" if words else "right", no_wrap=words)
        for number, row in enumerate(self.rows):
            shown.add_row(*row, style="bold cyan" if number in self.ours else None)
        console.print(shown)
        for note in self.notes:
            console.print(f"  {note}", style="dim")

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        rule = ["---"] * self.text_columns + ["---:"] * (len(self.columns) - self.text_columns)
        rows = [[f"**{cell}**" for cell in row] if i in self.ours else row for i, row in enumerate(self.rows)]
        text = "\n".join([f"{self.title}", "", line(self.columns), line(rule), *map(line, rows)])
        return text + "".join(f"\n\n{note}" for note in self.notes)


def why(reason: str) -> str:
    """A reason as a note says it."""
    return reason if reason.startswith("not ") else f"not timed, {reason}"


def floor_seconds(rows: Iterable[SpeedRow]) -> float:
    """The faster of a group's bare products."""
    return min((row.median for row in rows if row.contender.startswith(FLOORS)), default=math.nan)


def by_group(rows: Iterable[SpeedRow]) -> dict[Group, list[SpeedRow]]:
    grouped: dict[Group, list[SpeedRow]] = {}
    for row in rows:
        grouped.setdefault(row.group, []).append(row)
    return grouped


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """All there is to know about one group."""
    table = Table(
        f"{rows[0].group}: forward and backward",
        ("contender", "median", "spread", "of the floor", "runs", "error of loss", "of gradients"),
    )
    floor = floor_seconds(rows)
    for row in rows:
        name = f"{row.contender} ({row.setting})" if row.setting else row.contender
        if row.reason:
            table.notes.append(f"{name}: {why(row.reason)}")
            continue
        spread = "" if math.isnan(row.spread) else f"{row.spread:.0%}"
        errors = [format_error(row.errors.loss), format_error(row.errors.gradient)] if row.errors else ["", ""]
        times = [f"{row.median * 1e3:.1f} ms", spread, f"{row.median / floor:.2f}×", str(len(row.seconds))]
        table.add(name, *times, *errors, contender=row.contender)
    return table


def ratio_table(shape: Shape, rows: Iterable[SpeedRow]) -> Table:
    """A shape at a glance: every contender as a multiple of the four matrix products; with a frozen head, of three."""
    groups = {group: members for group, members in by_group(rows).items() if group.shape == shape}
    frozen = any(group.frozen_head for group in groups)
    table = Table(
        f"{shape}: forward and backward as multiples of the four bare matrix products"
        + (", three with a frozen head" if frozen else ""),
        ("contender", *(f"{group.dtype} {group.work}" for group in groups)),
    )
    for contender in _contenders(rows):
        cells = []
        for members in groups.values():
            row = next((row for row in members if row.contender == contender), None)
            timed = row is not None and not row.reason
            cells.append(f"{row.median / floor_seconds(members):.2f}" if row is not None and timed else "–")
        if any(cell != "–" for cell in cells):
            table.add(contender, *cells, contender=contender)
    floors = [floor_seconds(members) for members in groups.values()]
    table.add(
        "matmuls, ms" if frozen else "four matmuls, ms",
        *("–" if math.isnan(floor) else f"{floor * 1e3:.0f}" for floor in floors),
    )
    return table


def _contenders(rows: Iterable[SpeedRow]) -> list[str]:
    return list(dict.fromkeys(row.contender for row in rows if not row.contender.startswith(FLOORS)))


def memory_selection(rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Of a shape, a dtype and a kind of head one divergence, the reverse KL where it was measured: the others take
    about the same."""
    chosen: dict[Group, Divergence] = {}
    for row in rows:
        case = row.group._replace(divergence=REVERSE_KL)
        if case not in chosen or row.group.divergence == REVERSE_KL:
            chosen[case] = row.group.divergence
    return [row for row in rows if chosen[row.group._replace(divergence=REVERSE_KL)] == row.group.divergence]


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """Peak bytes of a step; one line per group."""
    contenders = [name for name in dict.fromkeys(row.contender for row in rows) if any(_used(rows, name))]
    table = Table(
        "Peak MiB of one step beyond its inputs, gradients included: live tensors (resident growth of the process)",
        ("case", *contenders, "gradients alone"),
        notes=["What a compiled graph allocates is seen in the resident bytes only."],
    )
    found = {(row.group, row.contender): row for row in rows}
    for group in dict.fromkeys(row.group for row in rows):
        cells = [_memory_cell(found.get((group, contender))) for contender in contenders]
        gradients = max(row.gradient_bytes for row in rows if row.group == group)
        table.add(str(group), *cells, f"{gradients / MIB:.0f}")
    return table


def _used(rows: Iterable[MemoryRow], contender: str) -> Iterable[bool]:
    return (not row.reason for row in rows if row.contender == contender)


def _memory_cell(row: MemoryRow | None) -> str:
    if row is None or row.reason:
        return "–"
    live = "" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f}"
    resident = "" if row.resident_bytes is None else f"({row.resident_bytes / MIB:.0f})"
    return f"{live} {resident}".strip() or "–"


def accuracy_table(rows: Sequence[AccuracyRow]) -> Table:
    """Error of the loss and, after the slash, of the worse gradient."""
    noises = list(dict.fromkeys(row.noise for row in rows))
    table = Table(
        f"{rows[0].shape}, {rows[0].dtype} inputs: relative error of loss / gradients against float64, by the noise "
        "between teacher and student",
        ("divergence", "contender", *(f"noise {noise:g}" for noise in noises)),
        text_columns=2,
        notes=["`<0`: the loss came out negative, which no divergence can be."],
    )
    found = {(row.divergence, row.contender, row.noise): row for row in rows}
    for divergence, contender in dict.fromkeys((row.divergence, row.contender) for row in rows):
        cells = [_accuracy_cell(found.get((divergence, contender, noise))) for noise in noises]
        if any(cell != "–" for cell in cells):
            table.add(str(divergence), contender, *cells, contender=contender)
    return table


def _accuracy_cell(row: AccuracyRow | None) -> str:
    if row is None or row.errors is None:
        return "–"
    sign = " (<0)" if row.loss < 0 else ""
    return f"{format_error(row.errors.loss)}{sign} / {format_error(row.errors.gradient)}"


def format_error(error: float) -> str:
    """Percent with two digits down to 0.01 %, scientific below."""
    if math.isnan(error):
        return "NaN"
    if error < 1e-4:
        return f"{error:.0e}"
    digits = max(0, 1 - math.floor(math.log10(error * 100)))
    return f"{error * 100:.{digits}f} %"


def report_tables(report: Report) -> list[Table]:
    """Every table of a report, in the order of reading."""
    tables = [ratio_table(shape, report.speed) for shape in dict.fromkeys(row.group.shape for row in report.speed)]
    if report.memory:
        tables.append(memory_table(memory_selection(report.memory)))
    if report.accuracy:
        tables.append(accuracy_table(report.accuracy))
    return tables + [speed_table(rows) for rows in by_group(report.speed).values()]


def describe(report: Report) -> str:
    """Machine and software, one line."""
    machine = report.machine
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    details = f"{machine['threads']} threads, {machine['cpu_capability']}" if machine["kind"] == "cpu" else "CUDA"
    details = ", ".join([details, *(f"{name}={value}" for name, value in machine.get("malloc", {}).items())])
    return f"{machine['name']} ({details}), {machine['date']}; Python {machine['python']}, {versions}"


def markdown(report: Report) -> str:
    """The whole report as a file beside its JSON."""
    tables = [table.markdown() for table in report_tables(report)]
    return "\n\n".join(["# Benchmark of linear_divergence", describe(report), *tables]) + "\n"


__all__ = [
    "Table",
    "accuracy_table",
    "by_group",
    "describe",
    "floor_seconds",
    "format_error",
    "markdown",
    "memory_selection",
    "memory_table",
    "ratio_table",
    "report_tables",
    "speed_table",
    "why",
]
