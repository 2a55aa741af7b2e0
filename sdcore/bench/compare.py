"""Sets two results of the same suite side by side: which rows got slower, and by how much?

    comparison = compare(Path("before.json"), Path("after.json"))
    comparison.slower(1.1)

A row is a contender in a case; its ratio is the median of the second file by the median of the first. Works on the JSON
of every suite, without torch. What differs from a test of significance: there is none. Measure both on one quiet
machine, and take the threshold from two runs of the same code.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..errors import ArgumentError

if TYPE_CHECKING:
    from rich.table import Table

THRESHOLD: Final = 1.1


class Key(NamedTuple):
    """Names a row: a contender in a case."""

    case: str
    contender: str


class Pair(NamedTuple):
    """Holds a row that is in both files; seconds are medians."""

    key: Key
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


class Comparison(NamedTuple):
    """Lists the rows in the order of the first file."""

    machines: tuple[str, str]
    rows: list[Pair]
    only_before: list[Key]  # timed in the first file only
    only_after: list[Key]

    def slower(self, threshold: float = THRESHOLD) -> list[Pair]:
        """Returns the rows whose ratio is above the threshold."""
        return [row for row in self.rows if row.ratio > threshold]


def compare(before: Path, after: Path) -> Comparison:
    """Pairs the rows of two files. Raises `ArgumentError` for one that is no result, or not of the same suite."""
    first, second = _read(before), _read(after)
    if ("speed" in first) != ("speed" in second):
        raise ArgumentError(f"{before} and {after} must be of the same suite")
    a, b = _medians(first), _medians(second)
    if a and b and not a.keys() & b.keys():
        raise ArgumentError(f"{before} and {after} have no row in common: are they of the same suite and sizes?")
    return Comparison(
        machines=(_machine(first), _machine(second)),
        rows=[Pair(key, a[key], b[key]) for key in a if key in b],
        only_before=[key for key in a if key not in b],
        only_after=[key for key in b if key not in a],
    )


def comparison_table(comparison: Comparison, threshold: float = THRESHOLD) -> Table:
    """Makes a table for a terminal: the slower rows in red, the faster in green."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title_justify="left", title=" → ".join(dict.fromkeys(comparison.machines)))
    table.add_column("case")
    table.add_column("contender")
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.rows:
        style = "bold red" if row.ratio > threshold else "green" if row.ratio < 1 / threshold else None
        cells = (f"{row.before * 1e3:.1f} ms", f"{row.after * 1e3:.1f} ms", f"{row.ratio:.2f}")
        table.add_row(*row.key, *cells, style=style)
    for keys, where in ((comparison.only_before, "first"), (comparison.only_after, "second")):
        for key in keys:
            table.add_row(*key, "–", "–", f"only in the {where}", style="dim")
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ArgumentError(f"{path} is not JSON: {error}") from error
    if not isinstance(stored, dict) or "machine" not in stored or not ({"speed", "rows"} & stored.keys()):
        raise ArgumentError(f"{path} is not a result of `sdcore bench`: it has no machine, or no rows")
    return stored


def _medians(stored: dict[str, Any]) -> dict[Key, float]:
    medians = {}
    for row in stored.get("speed", stored.get("rows", [])):
        if row["seconds"]:
            median = statistics.median(row["seconds"])
            if median > 0 and math.isfinite(median):
                medians[Key(_case(row), row["contender"])] = median
    return medians


def _case(row: dict[str, Any]) -> str:
    if "group" in row:
        return " ".join(str(value) for value in row["group"].values())
    rows, vocab, hidden = row["shape"]
    head = ", frozen head" if row.get("frozen_head") else ""
    return f"N={rows} V={vocab} H={hidden} {row['dtype']} {row['divergence']['name']}{head}"


def _machine(stored: dict[str, Any]) -> str:
    machine = stored["machine"]
    return f"{machine['name']}, {machine['date']}, torch {machine.get('versions', {}).get('torch', '?')}"
