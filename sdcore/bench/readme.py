"""The blocks of results in the README of a checkout, made from the newest committed JSON of every device."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ..errors import ArgumentError
from . import prefix, scaling, step, trainer
from .places import checkout, newest_results
from .report import Report, load
from .shapes import FULL_VOCABULARY
from .tables import accuracy_table, describe, memory_selection, memory_table, ratio_table

NOTHING = "No results are committed yet; {command} measures this machine."


class Block(NamedTuple):
    """What is between `<!-- name -->` and `<!-- /name -->`; `make(results folder, README's folder)` writes it."""

    name: str
    make: Callable[[Path, Path], str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name} -->"

    @property
    def end(self) -> str:
        return f"<!-- /{self.name} -->"

    def renewed(self, text: str, results: Path, root: Path) -> str:
        """`text` with the block between its markers made anew; raises `ArgumentError` where a marker is missing."""
        before, found_begin, rest = text.partition(self.begin)
        _, found_end, after = rest.partition(self.end)
        if not found_begin or not found_end:
            raise ArgumentError(f"the text must contain {self.begin} and, after it, {self.end}")
        return f"{before}{self.begin}\n\n{self.make(results, root)}\n\n{self.end}{after}"


def _source(path: Path, root: Path, report: Report) -> str:
    """On what a result was measured, and where all of it is."""
    place = _place(path.with_suffix(""), root)
    return f"Measured on {describe(report)}. [All numbers]({place}.json), [tables]({place}.md)."


def _picture(name: str, path: Path, root: Path) -> str:
    return f"![{name}]({_place(path, root)})"


def _place(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def divergence_block(results: Path, root: Path) -> str:
    """The output layer and its loss."""
    parts = []
    for path in newest_results(results):
        report = load(path)
        parts.append(_source(path, root, report))
        for shape in dict.fromkeys(row.group.shape for row in report.speed):
            parts.append(ratio_table(shape, report.speed).markdown())
        parts.append(memory_table(memory_selection(report.memory)).markdown())
        full = [row for row in report.accuracy if row.divergence in FULL_VOCABULARY]
        if full:
            parts.append(accuracy_table(full).markdown())
        for picture in sorted(path.parent.glob(f"{path.stem}-*.png")):
            name = picture.stem.removeprefix(f"{path.stem}-")
            parts.append(_picture(name, picture, root))
    return "\n\n".join(parts) or NOTHING.format(command="`make bench`")


def prefix_block(results: Path, root: Path) -> str:
    """The shared-prefix scheme."""
    parts = []
    for path in newest_results(results, "prefix"):
        report = prefix.load(path)
        parts.append(_source(path, root, report.general))
        parts.append(prefix.describe_models(report))
        parts += [table.markdown() for table in prefix.overviews(report)]
        if path.with_suffix(".png").exists():
            parts.append(_picture("Speed and memory of shared prefixes", path.with_suffix(".png"), root))
    return "\n\n".join(parts) or NOTHING.format(command="`sdcore bench prefix`")


def _overview_block(suite: ModuleType, name: str, results: Path, root: Path) -> str:
    """One table per device, of a suite that has one."""
    parts = []
    for path in newest_results(results, name):
        report = suite.load(path)
        parts.append(_source(path, root, report.general))
        parts += [suite.describe_models(report), suite.overview(report).markdown()]
    return "\n\n".join(parts) or NOTHING.format(command=f"`sdcore bench {name}`")


def scaling_block(results: Path, root: Path) -> str:
    """How time and memory grow: the picture and one table."""
    parts = []
    for path in newest_results(results, "scaling"):
        report = scaling.load(path)
        parts.append(_source(path, root, report.general))
        parts.append(scaling.overview(report).markdown())
        if path.with_suffix(".png").exists():
            parts.append(_picture("Time and peak memory against N, V, G and P", path.with_suffix(".png"), root))
    return "\n\n".join(parts) or NOTHING.format(command="`sdcore bench scaling`")


DIVERGENCE = Block("results", divergence_block)
PREFIX = Block("prefix results", prefix_block)
STEP = Block("step results", partial(_overview_block, step, "step"))
TRAINER = Block("trainer results", partial(_overview_block, trainer, "trainer"))
SCALING = Block("scaling results", scaling_block)
BLOCKS = (DIVERGENCE, PREFIX, STEP, TRAINER, SCALING)


def readme_file() -> Path:
    """Raises `ArgumentError` outside of a checkout."""
    root = checkout()
    if root is None:
        raise ArgumentError(
            "--readme renews the README of a checkout of sdcore, and this sdcore is an installed package"
        )
    return root / "README.md"


def update() -> Path:
    """Renew all blocks of the checkout's README; returns the README's path. Raises `ArgumentError`."""
    file = readme_file()
    text = file.read_text(encoding="utf-8")
    for block in BLOCKS:
        text = block.renewed(text, file.parent / "benchmarks" / "results", file.parent)
    file.write_text(text, encoding="utf-8")
    return file


__all__ = [
    "BLOCKS",
    "DIVERGENCE",
    "NOTHING",
    "PREFIX",
    "SCALING",
    "STEP",
    "TRAINER",
    "Block",
    "readme_file",
    "update",
]
