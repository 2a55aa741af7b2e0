"""The three blocks of results in the project's README, made from the newest committed JSON of every device."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import prefix, step
from benchmarks.report import RESULTS, load, newest_results
from benchmarks.shapes import FULL_VOCABULARY
from benchmarks.tables import accuracy_table, describe, memory_selection, memory_table, ratio_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
PREFIX_BEGIN, PREFIX_END = "<!-- prefix results -->", "<!-- /prefix results -->"
STEP_BEGIN, STEP_END = "<!-- step results -->", "<!-- /step results -->"
NOTHING = "No results are committed yet; `make bench` measures this machine."
NO_PREFIX = "No results are committed yet; `python -m benchmarks.prefix` measures this machine."

NO_STEP = "No results are committed yet; `python -m benchmarks.step` measures this machine."


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


def prefix_block(results: Path = RESULTS, root: Path = README.parent) -> str:
    """What belongs between the markers of the shared-prefix scheme."""
    parts = []
    for path in newest_results(results, "prefix"):
        report = prefix.load(path)
        place = Path(os.path.relpath(path, root)).as_posix().removesuffix(".json")
        parts.append(f"Measured on {describe(report.general)}. [All numbers]({place}.json), [tables]({place}.md).")
        parts.append(prefix.describe_models(report))
        parts += [table.markdown() for table in prefix.overviews(report)]
        if path.with_suffix(".png").exists():
            parts.append(f"![Speed and memory of shared prefixes]({place}.png)")
    return "\n\n".join(parts) or NO_PREFIX


def step_block(results: Path = RESULTS, root: Path = README.parent) -> str:
    """What belongs between the markers of the step's update phase."""
    parts = []
    for path in newest_results(results, "step"):
        report = step.load(path)
        place = Path(os.path.relpath(path, root)).as_posix().removesuffix(".json")
        parts.append(f"Measured on {describe(report.general)}. [All numbers]({place}.json), [tables]({place}.md).")
        parts += [step.describe_models(report), step.overview(report).markdown()]
    return "\n\n".join(parts) or NO_STEP


def with_block(text: str, results: Path = RESULTS, root: Path = README.parent) -> str:
    """`text` with the block between its markers made anew; raises ValueError where a marker is missing."""
    return _between(text, BEGIN, END, block(results, root))


def with_prefix_block(text: str, results: Path = RESULTS, root: Path = README.parent) -> str:
    """`with_block` for the other pair of markers."""
    return _between(text, PREFIX_BEGIN, PREFIX_END, prefix_block(results, root))


def with_step_block(text: str, results: Path = RESULTS, root: Path = README.parent) -> str:
    """`with_block` for the third pair of markers."""
    return _between(text, STEP_BEGIN, STEP_END, step_block(results, root))


def _between(text: str, begin: str, end: str, content: str) -> str:
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"README.md must contain {begin} and, after it, {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def update(readme: Path = README) -> None:
    readme.write_text(with_step_block(with_prefix_block(with_block(readme.read_text()))))


__all__ = [
    "BEGIN",
    "END",
    "NOTHING",
    "NO_PREFIX",
    "NO_STEP",
    "PREFIX_BEGIN",
    "PREFIX_END",
    "README",
    "STEP_BEGIN",
    "STEP_END",
    "block",
    "prefix_block",
    "step_block",
    "update",
    "with_block",
    "with_prefix_block",
    "with_step_block",
]
