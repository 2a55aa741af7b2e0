"""Writes the report as Markdown with PNGs beside it, for where HTML is not shown: an issue, a README, a model card.

Texts of the run are put into code blocks, whose fence is longer than any in the text, and elsewhere escaped.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..charts import figure_of, save
from ..diagnostics import RunData
from .notes import notes_of
from .page import Runs, compared, headline, sections_of, subtitle_of, title_of
from .samples import Sample, samples_of
from .series import Chart, changes_of, charts_by_topic, constants_of, draw, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS: Final = 3


def markdown(runs: Runs, path: Path) -> str:
    """Writes the pictures to a folder beside `path`, and returns the text."""
    single = runs[0][1] if len(runs) == 1 else None
    lines = [f"# {inline(title_of(runs))}", ""]
    lines += (
        [f"{inline(subtitle_of(single))}"] if single else [f"- {inline(n)}: {inline(subtitle_of(r))}" for n, r in runs]
    )
    lines += ["", *(_headline(single) if single else _compared(runs))]
    for label, run in runs:
        if notes := notes_of(run):
            heading = "What stands out" if single else f"What stands out in {inline(label)}"
            lines += ["", f"**{heading}**", "", *(f"- {inline(note)}" for note in notes)]
    folder = path.with_name(f"{path.stem}_files")
    for number, (topic, charts) in enumerate(charts_by_topic(runs).items()):
        picture = folder / f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', topic.lower()).strip('-')}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        save(figure_of([partial(_titled, chart) for chart in charts], columns=min(COLUMNS, len(charts))), picture)
        titles = ", ".join(chart.title for chart in charts)
        lines += ["", f"## {inline(topic)}", "", f"![{inline(titles)}]({folder.name}/{picture.name})"]
    if constants := constants_of(runs):
        listed = "; ".join(f"{inline(c.key.title)} {shown(c.last, c.key.unit)}" for c in constants)
        lines += ["", f"Unchanged throughout: {listed}."]
    if samples := samples_of(runs).samples:
        lines += ["", "## Completions"]
        for sample in samples:
            lines += _sample(sample, with_run=single is None)
    lines += _tables(runs, single)
    return "\n".join(lines) + "\n"


def _titled(chart: Chart, axes: Axes) -> None:
    axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title)
    draw(chart, chart.axes[0], axes)


def inline(text: str) -> str:
    """Escapes text such that it is nothing but text, on one line, also in a table."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!$])", r"\\\1", text)


def fenced(text: str) -> list[str]:
    """Puts text into a code block that it cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]


def _headline(run: RunData) -> list[str]:
    changes = headline(run)
    if not changes:
        return []
    rows = [
        f"| {inline(c.key.title)} | {shown(c.first, c.key.unit)} | {shown(c.last, c.key.unit)} | {inline(c.key.unit)} |"
        for c in changes
    ]
    return ["| | first | last | unit |", "| --- | ---: | ---: | --- |", *rows]


def _compared(runs: Runs) -> list[str]:
    rows = [
        f"| {inline(key.title)} | {' | '.join(shown(c.last, key.unit) if c else '–' for c in changes)} |"
        for key, changes in compared(runs)
    ]
    head = f"| at the end | {' | '.join(inline(label) for label, _ in runs)} |"
    return [head, f"| --- |{' ---: |' * len(runs)}", *rows] if rows else []


def _sample(sample: Sample, *, with_run: bool) -> list[str]:
    facts = [f"step {sample.step}"]
    facts += [] if sample.reward is None else [f"reward {shown(sample.reward)}"]
    facts += [] if sample.active is None else ["active" if sample.active else "not active: no loss"]
    name = f"{inline(sample.run)}, " if with_run else ""
    lines = ["", f"### {name}{', '.join(facts)}"]
    for title, text in (
        ("Prompt", sample.prompt),
        ("Privileged context", sample.privileged_context),
        ("Completion", sample.completion or "(empty)"),
        ("Feedback", sample.feedback),
    ):
        if text:
            lines += ["", f"{title}:", "", *fenced(text)]
    if highest := sample.highest:
        tokens = ", ".join(f"“{inline(token.text.strip() or '␣')}” {shown(token.divergence)}" for token in highest)
        lines += ["", f"Highest divergence in nats: {tokens}."]
    if means := [f"{part.whose} {shown(part.mean)}" for part in sample.parts if part.whose and part.mean is not None]:
        lines += ["", f"Mean divergence in nats: {', '.join(means)}."]
    return lines


def _tables(runs: Runs, single: RunData | None) -> list[str]:
    lines: list[str] = []
    if single and (changes := changes_of(single)):
        lines += [
            "",
            "## Metrics",
            "",
            "| metric | first | last | unit | meaning |",
            "| --- | ---: | ---: | --- | --- |",
        ]
        for c in changes.values():
            numbers = f"{shown(c.first, c.key.unit)} | {shown(c.last, c.key.unit)}"
            lines.append(f"| {inline(c.key.name)} | {numbers} | {inline(c.key.unit)} | {inline(c.key.meaning)} |")
    for label, run in runs:
        for name, facts in sections_of(run):
            of = "" if single else f" of {inline(label)}"
            lines += ["", f"## Settings{of}: {inline(name)}", "", "| | |", "| --- | --- |"]
            lines += [f"| {inline(setting)} | {inline(value)} |" for setting, value in facts.items()]
    return lines
