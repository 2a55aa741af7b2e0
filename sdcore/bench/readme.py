"""Renews the blocks of results in the documents of a checkout, from the newest committed JSON of every device.

benchmarks/README.md has a block of every suite and of the real models' states, docs/performance.md and README.md those
whose markers stand in them. Runs on states are short and several, so theirs are put together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from ..errors import ArgumentError
from .options import DIVERGENCE, STATES, SUITES, checkout, newest_results
from .peers import NO_TOP_K
from .rows import AnyRow, MemoryRow, Report, by_group
from .shapes import ALL, BOTH, Group
from .suites import suite_named
from .tables import NONE, Table, describe, floor_seconds, format_error, mebibytes, why

NOTHING: Final = "No results are committed yet; `sdcore bench {name}` measures this machine."
PAGES: Final = ("benchmarks/README.md", "docs/performance.md", "README.md")
OF_STATES, FIRST = "states", "first page"
# The columns of README.md, by the contenders' names in the results, and its models.
COLUMNS: Final = {
    "sdcore": "**sdcore**",
    "sdcore, to 0.4 %": "to 0.4 %",
    "plain torch": "plain PyTorch",
    "torch.compile": "torch.compile",
    "TRL chunked": "TRL",
    "Liger chunked": "Liger",
}
TITLES: Final = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}


class Block(NamedTuple):
    """Is what stands between `<!-- prefix results -->` and `<!-- /prefix results -->` (of the suite `prefix`)."""

    suite: str

    @property
    def marks(self) -> tuple[str, str]:
        return f"<!-- {self.suite} results -->", f"<!-- /{self.suite} results -->"

    def renewed(self, text: str, results: Path, folder: Path) -> str:
        """Makes the block of `text`, a page in `folder`, anew; raises `ArgumentError` where a marker is missing."""
        (begin, end), made = self.marks, self.made(results, folder)
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ArgumentError(f"the text must contain {begin} and, after it, {end}")
        return f"{before}{begin}\n\n{made}\n\n{end}{after}"

    def made(self, results: Path, folder: Path) -> str:
        """Shows the newest result of every device: on what it was measured, tables, pictures."""
        parts: list[str] = []
        if self.suite in (OF_STATES, FIRST):
            for report, files in on_states(results)[: 1 if self.suite == FIRST else None]:
                shown = first_page(report) if self.suite == FIRST else suite_named(DIVERGENCE).overviews(report)
                links = [f"[{path.parent.name}]({_place(path.with_suffix('.md'), folder)})" for path in files]
                parts += [table.markdown() for table in shown]
                parts.append(f"Measured on {describe(report.machine)}. All numbers: {', '.join(links)}.")
            return "\n\n".join(parts) or NOTHING.format(name="--states smollm2")
        suite = suite_named(self.suite)
        for path in newest_results(results, "" if self.suite == DIVERGENCE else self.suite):
            report, place = suite.load(path), _place(path.with_suffix(""), folder)
            parts.append(f"Measured on {describe(report.machine)}. [All numbers]({place}.json), [tables]({place}.md).")
            parts += suite.about(report)
            parts += [table.markdown() for table in suite.overviews(report)]
            for picture in sorted(path.parent.glob(f"{path.stem}*.png")) if suite.picture else []:
                what = picture.stem.removeprefix(path.stem).removeprefix("-") or suite.picture
                parts.append(f"![{what}]({_place(picture, folder)})")
        return "\n\n".join(parts) or NOTHING.format(name=self.suite)


def _place(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


BLOCKS: Final = tuple(Block(name) for name in (*SUITES, OF_STATES, FIRST))


def on_states(results: Path) -> list[tuple[Report, list[Path]]]:
    """Puts a device's newest results on real models' states together, and says of which files; newest device first."""
    files_of: dict[Path, list[Path]] = {}
    for path in sorted(newest_results(results, f"{OF_STATES}/*"), key=lambda path: path.stem, reverse=True):
        files_of.setdefault(path.parents[2], []).append(path)
    together = []
    for files in files_of.values():
        reports = [suite_named(DIVERGENCE).load(path) for path in files]
        whole = Report(machine=reports[0].machine)
        for report in reports:  # of what was measured twice, the newest
            groups, models = {row.group for row in whole.speed}, {entry["states"] for entry in whole.mass}
            whole.speed += [row for row in report.speed if row.group not in groups]
            whole.memory += [row for row in report.memory if row.group not in groups]
            whole.mass += [entry for entry in report.mass if entry["states"] not in models]
        whole.speed.sort(key=lambda row: _order(row.group))
        whole.memory.sort(key=lambda row: _order(row.group))
        together.append((whole, sorted(files)))
    return together


def _order(group: Group) -> tuple[int, ...]:
    return STATES.index(group.states), BOTH.index(group.dtype), ALL.index(group.divergence)


def first_page(report: Report) -> Iterator[Table]:
    """Makes README.md's tables, one for each model: time, memory, and the gradients' error in bfloat16."""
    speed, memory = by_group(report.speed), by_group(report.memory)
    for states in dict.fromkeys(group.states for group in speed):
        groups = [group for group in speed if group.states == states]
        vocab, hidden = groups[0].shape[1:]
        title = f"**{TITLES[states]}**, vocabulary {vocab:,}, hidden size {hidden}:"
        table = Table(title, ("", "limit", *COLUMNS.values()))
        for group in groups:
            floor = floor_seconds(speed[group])
            cells = [f"{row.median / floor:.2f}×" if row.seconds else NONE for row in _of_columns(speed[group])]
            _add(table, f"time, {group.dtype} {group.work}", f"{1e3 * floor:.0f} ms", cells)
            table.notes += [
                f"- {row.contender}, {group.dtype} {group.work}: {why(row.reason)}"
                for row in _of_columns(speed[group])
                if row.reason and not row.reason.endswith(NO_TOP_K)
            ]
        coarse = [group for group in groups if group.dtype == "bf16" and group.divergence.topk is None]
        for group in coarse:
            gradients = max(row.gradient_bytes for row in memory[group])
            _add(table, f"peak MiB, bf16 {group.work}", mebibytes(gradients), map(_peak, _of_columns(memory[group])))
        for group in coarse:
            cells = [format_error(row.errors.gradient) if row.errors else NONE for row in _of_columns(speed[group])]
            _add(table, f"gradient error, bf16 {group.work}", NONE, cells)
        yield table


def _of_columns(rows: Sequence[AnyRow]) -> list[AnyRow]:
    row_of = {row.contender: row for row in rows}
    return [row_of[name] for name in COLUMNS]


def _add(table: Table, name: str, limit: str, cells: Iterable[str]) -> None:
    ours, *theirs = cells
    table.add(name, limit, f"**{ours}**", *theirs)


def _peak(row: MemoryRow) -> str:
    # Inside a compiled graph no live tensor is seen: what is left is how much the process grew.
    grown = row.live_bytes is None and row.resident_bytes is not None
    return f"{mebibytes(row.resident_bytes)}*" if grown else mebibytes(row.live_bytes)


def pages() -> dict[Path, str]:
    """Returns the pages that have blocks, with every block made anew. Raises `ArgumentError` outside of a checkout."""
    root = checkout()
    if root is None:
        raise ArgumentError("--readme renews pages of a checkout of sdcore, and this sdcore is an installed package")
    renewed = {}
    for number, name in enumerate(PAGES):
        page = root / name
        text = page.read_text(encoding="utf-8")
        for block in BLOCKS:
            if (number == 0 and block.suite != FIRST) or block.marks[0] in text:
                text = block.renewed(text, root / "benchmarks" / "results", page.parent)
        renewed[page] = text
    return renewed


def update() -> list[Path]:
    """Writes the pages with their blocks made anew; returns them. Raises `ArgumentError`."""
    renewed = pages()
    for page, text in renewed.items():
        page.write_text(text, encoding="utf-8")
    return list(renewed)
