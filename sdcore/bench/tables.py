"""Lays out results as tables, once, for the terminal (rich) and for Markdown.

Here are what all suites use, and the tables of the suite `divergence`; the others' are made of their columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from .rows import FLOORS, AccuracyRow, MemoryRow, SpeedRow, by_group
from .shapes import MIB, REVERSE_KL, Divergence, Group, Shape

NONE = "–"
OURS = "sdcore"  # what the names of our contenders of the output layer begin with
Row = TypeVar("Row", bound=SpeedRow)


@dataclass
class Table:
    """Holds cells: the first `text_columns` are words, the others numbers; `ours` are set off, `notes` go below."""

    title: str
    columns: Sequence[str]
    text_columns: int = 1
    rows: list[list[str]] = field(default_factory=list)
    ours: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str, ours: bool = False) -> None:
        if ours:
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


def pivot(
    table: Table,
    groups: Sequence[Sequence[Row]],
    cells: Callable[[Row | None, Sequence[Row]], Sequence[str]],
    ours: Callable[[Row], bool],
    *,
    keep_empty: bool = False,
) -> Table:
    """Adds a line for each contender, of its cells in each group of rows (None: it was not timed there).

    A contender that was timed nowhere has a line only with `keep_empty`.
    """
    for contender in dict.fromkeys(row.contender for rows in groups for row in rows):
        of_contender = [
            next((row for row in rows if row.contender == contender and not row.reason), None) for rows in groups
        ]
        line = [cell for row, rows in zip(of_contender, groups, strict=True) for cell in cells(row, rows)]
        if keep_empty or any(cell != NONE for cell in line):
            table.add(
                contender, *line, ours=any(ours(row) for rows in groups for row in rows if row.contender == contender)
            )
    return table


def why(reason: str) -> str:
    """Words a reason as a note says it."""
    return reason if reason.startswith("not ") else f"not timed, {reason}"


def ratio(value: float, unit: str = "") -> str:
    return NONE if math.isnan(value) else f"{value:.2f}{unit}"


def spread(row: SpeedRow, unknown: str = NONE) -> str:
    return unknown if math.isnan(row.spread) else f"{row.spread:.0%}"


def mebibytes(count: int | None) -> str:
    return NONE if count is None else f"{count / MIB:.0f}"


def format_error(error: float) -> str:
    """Shows percent with two digits down to 0.01 %, scientific below."""
    if math.isnan(error):
        return "NaN"
    if error < 1e-4:
        return f"{error:.0e}"
    digits = max(0, 1 - math.floor(math.log10(error * 100)))
    return f"{error * 100:.{digits}f} %"


def describe(machine: Mapping[str, Any]) -> str:
    """Says machine and software in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    details = f"{machine['threads']} threads, {machine['cpu_capability']}" if machine["kind"] == "cpu" else "CUDA"
    details = ", ".join([details, *(f"{name}={value}" for name, value in machine.get("malloc", {}).items())])
    return f"{machine['name']} ({details}), {machine['date']}; Python {machine['python']}, {versions}"


def floor_seconds(rows: Iterable[SpeedRow]) -> float:
    """Returns the time of the faster of a group's bare products."""
    return min((row.median for row in rows if row.contender.startswith(FLOORS)), default=math.nan)


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """Shows all there is to know about one group."""
    heads = ("contender", "median", "spread", "of the floor", "runs", "error of loss", "of gradients")
    table, floor = Table(f"{rows[0].group}: forward and backward", heads), floor_seconds(rows)
    for row in rows:
        name = f"{row.contender} ({row.setting})" if row.setting else row.contender
        if row.reason:
            table.notes.append(f"{name}: {why(row.reason)}")
            continue
        errors = [format_error(row.errors.loss), format_error(row.errors.gradient)] if row.errors else ["", ""]
        times = [f"{row.median * 1e3:.1f} ms", spread(row, ""), ratio(row.median / floor, "×"), str(len(row.seconds))]
        table.add(name, *times, *errors, ours=row.contender.startswith(OURS))
    return table


def ratio_table(shape: Shape, rows: Iterable[SpeedRow]) -> Table:
    """Shows a shape at a glance: all contenders as multiples of the four matrix products, three with a frozen head."""
    groups = {group: members for group, members in by_group(rows).items() if group.shape == shape}
    frozen = any(group.frozen_head for group in groups)
    table = Table(
        f"{next(iter(groups)).of}: forward and backward as multiples of the four bare matrix products"
        + (", three with a frozen head" if frozen else ""),
        ("contender", *(f"{group.dtype} {group.work}" for group in groups)),
    )
    pivot(
        table,
        [[row for row in members if not row.contender.startswith(FLOORS)] for members in groups.values()],
        lambda row, rows: [ratio(row.median / floor_seconds(groups[row.group])) if row else NONE],
        lambda row: row.contender.startswith(OURS),
    )
    floors = [floor_seconds(members) * 1e3 for members in groups.values()]
    name = "matmuls, ms" if frozen else "four matmuls, ms"
    table.add(name, *(NONE if math.isnan(floor) else f"{floor:.0f}" for floor in floors))
    return table


def error_table(shape: Shape, rows: Iterable[SpeedRow]) -> Table:
    """Shows the worse gradient's error of all contenders at a shape, where they were timed."""
    groups = {group: members for group, members in by_group(rows).items() if group.shape == shape}
    title = f"{next(iter(groups)).of}: relative error of the worse gradient against float64"
    table = Table(title, ("contender", *(f"{group.dtype} {group.work}" for group in groups)))

    def cells(row: SpeedRow | None, _: Sequence[SpeedRow]) -> list[str]:
        return [format_error(row.errors.gradient) if row and row.errors else NONE]

    return pivot(table, list(groups.values()), cells, lambda row: row.contender.startswith(OURS))


def mass_table(entries: Iterable[Mapping[str, Any]]) -> Table:
    """Shows how much of the probability k tokens have, on both sides."""
    title = "Share of the probability that the likeliest k tokens have, mean over the rows"
    table = Table(title, ("states", "k", "teacher", "student"))
    for entry in entries:
        table.add(entry["states"], str(entry["k"]), *(f"{entry[side]:.1%}" for side in ("teacher", "student")))
    return table


def memory_selection(rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Selects one divergence per shape, dtype and kind of head: the reverse KL where it was measured.

    The others take about the same.
    """
    chosen: dict[Group, Divergence] = {}
    for row in rows:
        case = row.group._replace(divergence=REVERSE_KL)
        if case not in chosen or row.group.divergence == REVERSE_KL:
            chosen[case] = row.group.divergence
    return [row for row in rows if chosen[row.group._replace(divergence=REVERSE_KL)] == row.group.divergence]


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """Shows the peak bytes of a step, one line per group."""
    contenders = list(dict.fromkeys(row.contender for row in rows if not row.reason))
    table = Table(
        "Peak MiB of one step beyond its inputs, gradients included: live tensors (resident growth of the process)",
        ("case", *contenders, "gradients alone"),
        notes=["What a compiled graph allocates is seen in the resident bytes only."],
    )
    for group, members in by_group(rows).items():
        row_of = {row.contender: row for row in members}
        cells = [_memory_cell(row_of.get(contender)) for contender in contenders]
        table.add(str(group), *cells, mebibytes(max(row.gradient_bytes for row in members)))
    return table


def _memory_cell(row: MemoryRow | None) -> str:
    if row is None or row.reason:
        return NONE
    live = "" if row.live_bytes is None else f"{row.live_bytes / MIB:.0f}"
    resident = "" if row.resident_bytes is None else f"({row.resident_bytes / MIB:.0f})"
    return f"{live} {resident}".strip() or NONE


def accuracy_table(rows: Sequence[AccuracyRow]) -> Table:
    """Shows the error of the loss and, after the slash, of the worse gradient."""
    noises = list(dict.fromkeys(row.noise for row in rows))
    table = Table(
        f"{rows[0].shape}, {rows[0].dtype} inputs: relative error of loss / gradients against float64, by the noise "
        "between teacher and student",
        ("divergence", "contender", *(f"noise {noise:g}" for noise in noises)),
        text_columns=2,
        notes=["`<0`: the loss came out negative, which no divergence can be."],
    )
    row_of = {(row.divergence, row.contender, row.noise): row for row in rows}
    for divergence, contender in dict.fromkeys((row.divergence, row.contender) for row in rows):
        cells = [_accuracy_cell(row_of.get((divergence, contender, noise))) for noise in noises]
        if any(cell != NONE for cell in cells):
            table.add(str(divergence), contender, *cells, ours=contender.startswith(OURS))
    return table


def _accuracy_cell(row: AccuracyRow | None) -> str:
    if row is None or row.errors is None:
        return NONE
    sign = " (<0)" if row.loss < 0 else ""
    return f"{format_error(row.errors.loss)}{sign} / {format_error(row.errors.gradient)}"
