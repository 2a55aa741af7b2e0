"""Runs the reproduction and writes what it found: verdicts, tables and plots, from the records of the runs.

    run(Path("docs/reproduction"), studies=None, group="small", quick=False, resume=True, console=Console())

writes into `output`, per study, `<study>.jsonl` (the raw numbers, a line per run) and `<study>.png`, and per group of
studies a page, `README.md` or `real.md`, that starts with what did not reproduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from sdcore.charts import figure_of, line, require_matplotlib, save
from sdcore.errors import ArgumentError

from .records import (
    TUNING_SEED,
    Archive,
    Estimate,
    Panel,
    Record,
    Results,
    Study,
    Verdict,
    checked_seeds,
    estimate,
)
from .schedule import Scope, studies_of, work

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORDER = ("opposite", "not reproduced", "undecided", "reproduced")
HEADINGS = {
    "opposite": "The opposite was found",
    "not reproduced": "Not reproduced",
    "undecided": "Could not be compared",
    "reproduced": "Reproduced",
}


class Page(NamedTuple):
    """Says what is the same for all studies of a group."""

    file: str
    seeds: int  # unless told
    title: str
    command: str
    seed: str  # what it is, and how arms are compared
    tokens: str  # what is counted
    words: str  # of the tables


COMPARED = (
    "so that arms are compared seed by seed; an effect of three standard errors counts as reproduced. A standard error "
    "below what one answer changes is raised to that. “Matched” is read "
)
PAGES = {
    "small": Page(
        "README.md",
        5,
        "Reproduction on the small world",
        "`make reproduce`",
        f"A seed is a new task with its own questions, the same for every arm, {COMPARED}at the first checkpoint where "
        "the new task is at the level named.",
        "Tokens count all that a model reads or writes in training: sampling, the student's pass and the teacher's.",
        "*New* is the task that is learned, without help; *prior*, tasks that the model knew before; *in-context*, "
        "other open names with hints in view. Answers are sampled at temperature 1 and have five digits, all of which "
        "must be right; *lenient* allows the expert's style, *strict* only the model's own.",
    ),
    "real": Page(
        "real.md",
        3,
        "Reproduction on two real models",
        "`make reproduce-real`",
        "A seed draws the questions that are held out or asked, the order of the data and the adapter's start, the "
        f"same for every arm, {COMPARED}where the held-out questions come to the level named, on the line between the "
        "two checkpoints around it. The handbook's facts and the questions of general knowledge are the same for all "
        "seeds: what is found is about them.",
        "Tokens are those of the completions.",
        "*Right* is the share of held-out questions that are answered right without any help; *general*, of questions "
        "of general knowledge; *perplexity* is that of a page of prose. *Kept* is the mean of general knowledge and of "
        "the prose's perplexity, each as a share of what it was before training: 1 is nothing lost. Answers are the "
        "likeliest ones, of 24 tokens at most. Both models, SmolLM2-135M-Instruct and the base model Gemma 3 270M, "
        "learn by LoRA of rank 16.",
    ),
}


class Finding(NamedTuple):
    """Holds a study with its reported runs and what they say."""

    study: Study
    scope: Scope
    results: Results
    verdicts: list[Verdict]


def run(
    output: Path,
    *,
    seeds: int | None = None,
    studies: Sequence[str] | None = None,
    group: str | None = None,
    quick: bool = False,
    resume: bool = True,
    console: Console,
    workers: int = 2,
    nice: int = 0,
) -> list[Finding]:
    """Makes the missing runs of these studies, judges them, and writes tables and plots into `output`.

    `studies` are names or claims; None: all of the group. A `group` of None is that of the studies, or the small
    world's. `seeds` of None are those of the group's page, which covers all of its studies of which there is every run.

    `resume=False` makes all runs anew. `quick` is a subset of arms with smaller settings and fixed learning rates: it
    tells whether the code works, not what is true. `workers` processes with one thread each, at priority `nice`; a
    single worker is this very process. Runs in `output` with other seeds or settings stay there.

    Raises `ArgumentError` for arguments that do not fit, and `ImportError` without matplotlib, before any work.
    """
    if workers < 1:
        raise ArgumentError(f"workers must be at least 1, got {workers}")
    if not 0 <= nice <= 19:
        raise ArgumentError(f"nice must be in [0, 19], got {nice}")
    chosen = studies_of(studies, group)
    scopes = {
        name: Scope(
            studies=tuple(study for study in chosen if study.group == name),
            seeds=checked_seeds(page.seeds if seeds is None else seeds),
            quick=quick,
        )
        for name, page in PAGES.items()
    }
    require_matplotlib("a plot")
    archive = Archive(output)
    findings = []
    for name, scope in scopes.items():
        if scope.studies:
            if not resume:
                archive.keep([], scope.owns)
            work(scope, archive, workers=workers, nice=nice, console=console)
            findings += write(name, scope, archive, console)
    return findings


def write(group: str, scope: Scope, archive: Archive, console: Console) -> list[Finding]:
    """Writes the group's page and the plots of the scope's studies, of which every run is there."""
    page, output = PAGES[group], archive.folder
    # With rates from before a change, runs are not what the tables show.
    archive.keep([job.key for job in scope.jobs(archive.records)], scope.owns)
    whole = replace(scope, studies=studies_of(None, group))
    findings = [finding for study in whole.studies if (finding := find(study, whole, archive)) is not None]
    for finding in findings:
        if finding.study in scope.studies:
            plot(finding, output / f"{finding.study.name}.png")
    text = text_of(page, findings, archive, quick=scope.quick)
    (output / page.file).write_text(text, encoding="utf-8")
    for outcome in ORDER:
        for finding in findings:
            for verdict in finding.verdicts:
                if verdict.outcome == outcome:
                    console.print(f"[bold]{outcome}[/] {verdict.sentence}", highlight=False)
    console.print(f"tables: {output / page.file}")
    return findings


def find(study: Study, scope: Scope, archive: Archive) -> Finding | None:
    """Judges the study's reported runs; None if some are missing."""
    own = replace(scope, studies=(study,))
    try:
        jobs = own.reported(archive.records)
        if not jobs:
            return None
        records = [archive.records[job.key] for job in jobs]
    except KeyError:
        return None
    by_arm: dict[str, dict[int, Record]] = {}
    for record in records:
        by_arm.setdefault(record.job.arm, {})[record.job.seed] = record
    # One answer more or less in a measurement.
    results = Results(by_arm, resolution=1 / float(own.settings(study).get("episodes", 200)))  # type: ignore[arg-type]
    return Finding(study, own, results, [] if scope.quick else study.judge(results))


def text_of(page: Page, findings: Sequence[Finding], archive: Archive, *, quick: bool) -> str:
    """Writes a page: verdicts, worst first; then how it was measured; then a section per study."""
    lines = [f"# {page.title}", ""]
    if quick:
        lines += ["**A quick subset: smaller settings, untuned learning rates, no verdicts.**", ""]
    for outcome in ORDER:
        said = [
            f"- {verdict.sentence} ([{finding.study.name}](#{_anchor(finding.study.title)}))"
            for finding in findings
            for verdict in finding.verdicts
            if verdict.outcome == outcome
        ]
        if said:
            lines += [f"## {HEADINGS[outcome]}", "", *said, ""]
    shown = {job.key for finding in findings for job in finding.scope.jobs(archive.records)}
    minutes = sum(archive.records[key].cpu_seconds for key in shown) / 60
    seeds = len(findings[0].scope.seeds) if findings else 0
    lines += [
        "## How it was measured",
        "",
        f"{page.command}, {minutes:.0f} CPU minutes, {seeds} seeds; means ± standard errors over the seeds. "
        f"{page.seed}",
        "",
        f"Learning rates are chosen per arm on seed {TUNING_SEED}, which is not reported, by the rule of the study; "
        "the grids with their outcomes are at the end of each section. A control has the rate of the arm that it "
        f"controls. {page.tokens}",
        "",
        page.words,
        "",
    ]
    for finding in findings:
        lines += section(finding, archive)
    return "\n".join(lines).rstrip() + "\n"


def section(finding: Finding, archive: Archive) -> list[str]:
    study, scope, results = finding.study, finding.scope, finding.results
    titles = ["", "rate", *(column.title for column in study.columns)]
    rows = []
    for arm in scope.arms(study):
        rate = next(iter(results.records[arm.name].values())).job.learning_rate
        numbers = [cell(results.estimate(arm.name, column.quantity), column.digits) for column in study.columns]
        rows.append([arm.title, f"{rate:g}", *numbers])
    lines = [f"## {study.title}", "", f"Claimed: {study.claimed}", "", *markdown(titles, rows), ""]
    if study.notes:
        lines += [study.notes, ""]
    lines += study.more(results)
    lines += [f"![{study.title}]({study.name}.png)", ""]
    grid = tuning_rows(finding, archive)
    if grid:
        titles = ["", "rate", *(column.title for column in study.columns), "chosen"]
        lines += [
            f"<details><summary>Learning rates on seed {TUNING_SEED}</summary>",
            "",
            f"Chosen: {study.rule}.",
            "",
            *markdown(titles, grid),
            "",
            "</details>",
            "",
        ]
    return lines


def tuning_rows(finding: Finding, archive: Archive) -> list[list[str]]:
    study, scope = finding.study, finding.scope
    rows = []
    for arm in scope.arms(study):
        grid = scope.grid(study, arm)
        chosen = scope.rate(study, arm, archive.records)
        for job in grid:
            points = archive.records[job.key].points
            numbers = [cell(estimate([column.quantity(points)]), column.digits) for column in study.columns]
            mark = "✓" if job.learning_rate == chosen else ""
            rows.append([arm.title, f"{job.learning_rate:g}", *numbers, mark])
    return rows


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = ["---", *("---:" for _ in titles[1:])]
    return ["| " + " | ".join(row) + " |" for row in (titles, align, *rows)]


def cell(value: Estimate | None, digits: int) -> str:
    """Formats as `0.97 ± 0.01`, with the number of seeds where not all have it; a single run has no error."""
    if value is None:
        return "never"
    text = f"{value.mean:.{digits}f}"
    if value.of > 1:
        text += f" ± {value.error:.{digits}f}" if value.seeds > 1 else ""
        text += f" ({value.seeds}/{value.of})" if value.seeds < value.of else ""
    return text


def plot(finding: Finding, path: Path) -> None:
    """Draws a panel per quantity: the mean over seeds with a band of one standard error."""
    study, scope = finding.study, finding.scope

    def draw(panel: Panel, axes: Axes) -> None:
        from matplotlib import colormaps

        colours = colormaps["tab20" if len(study.arms) > 10 else "tab10"]
        for i, arm in enumerate(scope.arms(study)):
            xs, means, errors = curve(list(finding.results.records[arm.name].values()), panel)
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            line(axes, xs, means, band=(low, high), label=arm.title, color=colours(i), marker=".")
        axes.set(title=panel.title, xlabel=panel.x)
        if panel.log_y:
            axes.set_yscale("log")
        if panel.log_x:
            # Linear up to the first checkpoint, so that the start is in the picture.
            axes.set_xscale("symlog", linthresh=next((place for place in xs if place > 0), 1.0))
        if panel.x == "tasks":
            axes.set_xticks(xs)

    panels = [partial(draw, panel) for panel in study.panels]
    figure = figure_of(panels, columns=min(4, len(panels)), size=(4.2, 3.8), legend="below")
    save(figure, path)


def curve(records: Sequence[Record], panel: Panel) -> tuple[list[float], list[float], list[float]]:
    """Averages over the runs, checkpoint by checkpoint, as far as every run has come: x, means, standard errors."""
    xs, means, errors = [], [], []
    for points in zip(*(record.points for record in records), strict=False):
        value = estimate([point.get(panel.y) for point in points])
        if value is not None:
            xs.append(sum(point[panel.x] for point in points) / len(points))
            means.append(value.mean)
            errors.append(value.error)
    return xs, means, errors


def _anchor(title: str) -> str:
    """Makes a heading's anchor as GitHub does."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
