"""Renews the blocks of results in the documents of a checkout, from the newest committed JSON of every device.

benchmarks/README.md has a block of every suite, docs/performance.md those whose markers stand in it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

from ..errors import ArgumentError
from .options import DIVERGENCE, SUITES, checkout, newest_results
from .suites import suite_named
from .tables import describe

NOTHING: Final = "No results are committed yet; `sdcore bench {name}` measures this machine."
PAGES: Final = ("benchmarks/README.md", "docs/performance.md")


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
        suite = suite_named(self.suite)
        parts = []
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


BLOCKS: Final = tuple(Block(name) for name in SUITES)


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
            if number == 0 or block.marks[0] in text:
                text = block.renewed(text, root / "benchmarks" / "results", page.parent)
        renewed[page] = text
    return renewed


def update() -> list[Path]:
    """Writes the pages with their blocks made anew; returns them. Raises `ArgumentError`."""
    renewed = pages()
    for page, text in renewed.items():
        page.write_text(text, encoding="utf-8")
    return list(renewed)
