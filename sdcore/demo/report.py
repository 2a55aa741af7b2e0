"""Shows what the demo measured: a table on the terminal, a JSON of the numbers, a PNG of the curves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sdcore.charts import figure_of, line, save
from sdcore.demo.experiment import Skill, Task
from sdcore.world.verifier import Accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Learner = Literal["sdft", "sft", "oracle"]

TITLES: Final[dict[Learner, str]] = {"sdft": "SDFT", "sft": "SFT", "oracle": "oracle"}
COLUMNS: Final = ("new, lenient", "new, strict", "prior", "in-context")
LEGEND: Final = (
    ("new, lenient", "the new task without any context: all five digits right, in whatever style"),
    ("new, strict", "the same answers: right and in the model's own style, without the demonstration's H"),
    ("prior", "tasks that the model knew before, lenient: what was not forgotten"),
    ("in-context", "other task names with hints in view, lenient: can the model still learn from its context?"),
    ("teacher", "the model before training with the demonstration in view: what SDFT distils, and its ceiling"),
    ("SDFT", "distilled from that teacher, on the student's own answers to the bare question"),
    ("SFT", "cross-entropy on the same demonstrations; shown after as many steps as SDFT, and after training on"),
    ("oracle", "cross-entropy on the same answers in the model's own style, which a real expert does not write"),
)


class Point(NamedTuple):
    """Says what a model can do after `step` training steps."""

    step: int
    skills: dict[Skill, Accuracy]


class Sample(NamedTuple):
    """Holds a question of the new task and sampled answers to it, `<eos>` included."""

    question: str
    right: str
    before: str
    after: dict[Learner, str]


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    settings: dict[str, Any]  # every setting that the numbers depend on
    task: Task
    teacher: Accuracy  # the new task with the demonstration in view, before training: what SDFT distils
    curves: dict[Learner, list[Point]]  # each starts with the untrained model
    samples: list[Sample]

    def to_json(self) -> str:
        """Returns the numbers without times and output paths: two runs with one seed give the same text."""
        curves = {
            learner: [
                {"step": point.step} | {skill: value._asdict() for skill, value in point.skills.items()}
                for point in points
            ]
            for learner, points in self.curves.items()
        }
        parts = {
            "settings": self.settings,
            "task": {"name": self.task.name, "digits": self.task.digits},
            "teacher": self.teacher._asdict(),
            "curves": curves,
            "samples": [sample._asdict() for sample in self.samples],
        }
        return json.dumps(parts, indent=2) + "\n"


def table_points(report: DemoReport) -> list[tuple[str, Point]]:
    """Returns the table's rows: the start, then every learner at its end, SFT also after as many steps as SDFT."""
    sdft, sft, oracle = (report.curves[learner] for learner in TITLES)
    rows = [("before", sdft[0]), ("SDFT", sdft[-1])]
    if sft[-1].step != sdft[-1].step:
        rows += [("SFT", point) for point in sft if point.step == sdft[-1].step]
    return [*rows, ("SFT", sft[-1]), ("oracle", oracle[-1])]


def print_report(report: DemoReport, console: Console) -> None:
    """Prints two tables that fit 80 columns, and a legend of every row and column."""
    count = report.teacher.answers
    error = 0.5 / count**0.5
    console.print(f"\nShares of right answers, {count} sampled for each, standard error at most {error:.3f}")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for column in ("steps", *COLUMNS):
        table.add_column(column, justify="right")
    table.add_row("teacher", "", f"{report.teacher.lenient:.2f}", f"{report.teacher.strict:.2f}", end_section=True)
    for name, point in table_points(report):
        new, prior, in_context = (point.skills[skill] for skill in ("new", "prior", "in_context"))
        numbers = (new.lenient, new.strict, prior.lenient, in_context.lenient)
        table.add_row(name, str(point.step), *(f"{number:.2f}" for number in numbers))
    console.print(table)
    legend = Table.grid(padding=(0, 2))
    for name, meaning in LEGEND:
        legend.add_row(f"[bold]{name}[/]", meaning)
    console.print(legend)

    console.print("\nSampled answers to the new task")
    answers = Table(box=SIMPLE_HEAD, show_header=False)
    for sample in report.samples:
        answers.add_row("[bold]question[/]", f"[bold]{sample.question}[/]")
        answers.add_row("right", sample.right)
        answers.add_row("before", sample.before)
        for learner, name in TITLES.items():
            answers.add_row(f"after {name}", sample.after[learner], end_section=learner == "oracle")
    console.print(answers)


def plot_curves(report: DemoReport, path: Path) -> None:
    """Writes one panel per ability as a PNG; a dotted line marks the teacher on the new task."""
    panels: tuple[tuple[str, Skill, Literal["lenient", "strict"]], ...] = (
        ("new task, lenient", "new", "lenient"),
        ("new task, strict", "new", "strict"),
        ("prior tasks", "prior", "lenient"),
        ("in-context, other names", "in_context", "lenient"),
    )

    def draw(title: str, skill: Skill, judged: Literal["lenient", "strict"], axes: Axes) -> None:
        for learner, points in report.curves.items():
            heights = [getattr(point.skills[skill], judged) for point in points]
            line(axes, [point.step for point in points], heights, marker="o", label=TITLES[learner])
        if skill == "new":
            axes.axhline(getattr(report.teacher, judged), color="gray", linestyle=":", label="teacher, in context")
        axes.set(title=title, xlabel="training steps", ylim=(-0.03, 1.03))

    figure = figure_of(
        [partial(draw, *panel) for panel in panels], columns=len(panels), size=(3.5, 3.6), legend="below", sharey=True
    )
    figure.axes[0].set_ylabel("accuracy of sampled answers")
    save(figure, path)
