"""The block of results in the project's README, made from the newest committed JSON of every device."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.report import RESULTS, load, newest_results
from benchmarks.shapes import FULL_VOCABULARY
from benchmarks.tables import accuracy_table, describe, memory_selection, memory_table, ratio_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
NOTHING = "No results are committed yet; `make bench` measures this machine."


def block(results: Path = RESULTS, root: Path = README.parent) -> str:
    """What belongs between the markers."""
    parts = []
    for path in newest_results(results):
        report = load(path)
        place = Path(os.path.relpath(path, root)).as_posix()
        parts.append(
            f"Measured on {describe(report)}. [All numbers]({place}), [tables]({place.removesuffix('.json')}.md)."
        )
        for shape in dict.fromkeys(row.group.shape for row in report.speed):
            parts.append(ratio_table(shape, report.speed).markdown())
        parts.append(memory_table(memory_selection(report.memory)).markdown())
        full = [row for row in report.accuracy if row.divergence in FULL_VOCABULARY]
        if full:
            parts.append(accuracy_table(full).markdown())
        for picture in sorted(path.parent.glob(f"{path.stem}-*.png")):
            name = picture.stem.removeprefix(f"{path.stem}-")
            parts.append(f"![{name}]({Path(os.path.relpath(picture, root)).as_posix()})")
    return "\n\n".join(parts) or NOTHING


def with_block(text: str, results: Path = RESULTS, root: Path = README.parent) -> str:
    """`text` with the block between its markers made anew; raises ValueError where a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must contain {BEGIN} and, after it, {END}")
    return f"{before}{BEGIN}\n\n{block(results, root)}\n\n{END}{after}"


def update(readme: Path = README) -> None:
    readme.write_text(with_block(readme.read_text()))


__all__ = ["BEGIN", "END", "NOTHING", "README", "block", "update", "with_block"]
