"""Turns the lines of a run's log into what a report draws: series, charts by topic, and first against last.

A run of thousands of steps is reduced to some eighty points: each is the mean of its bucket, with the least and the
greatest value around it as a band, so that noise is averaged and a single spike is still seen. Metrics that never
changed are no chart but a line of text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from ..charts import count_on_x, line
from ..diagnostics import RunData, key_of
from ..diagnostics.keys import OTHER, TOPICS, Key
from ..diagnostics.runlog import RESERVED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Axis = Literal["step", "samples", "tokens"]
AXES: Final[tuple[Axis, ...]] = ("step", "samples", "tokens")
AXIS_TITLES: Final[dict[Axis, str]] = {
    "step": "optimizer step",
    "samples": "completions",
    "tokens": "completion tokens",
}
MOST_POINTS: Final = 80
# So few points are marked, or a single one would not be seen.
MARKED: Final = 12
# First and last are means over this share of a series, so that one noisy step does not decide.
ENDS: Final = 0.05
MOST_AT_ENDS: Final = 50

# Metrics that are read together: the title of their chart, then each with its label there, in the order of the report.
# All others have a chart of their own.
TOGETHER: Final[dict[str, dict[str, str]]] = {
    "Reward": {"self_distillation/reward_mean": "mean"},
    "Groups": {
        "self_distillation/success_group_fraction": "with a success",
        "self_distillation/flat_group_fraction": "with flat rewards",
    },
    "Active completions": {
        "self_distillation/reprompt_sample_fraction": "active",
        "self_distillation/feedback_used_fraction": "feedback used",
        "self_distillation/feedback_available_fraction": "has feedback",
    },
    "Evaluation": {
        "eval_reward_mean": "mean reward",
        "eval_success_rate": "successes",
        "eval_pass_any": "any success",
    },
    "Distillation loss": {"self_distillation/distillation_loss": "loss"},
    "Divergence of the first tokens": {f"loss/position_{i}": f"token {i}" for i in range(4)},
    "Entropy": {"student/entropy": "student", "teacher/entropy": "teacher"},
    "Entropy gap": {"teacher/entropy_gap": "gap"},
    "Log-probability of the sampled tokens": {"student/logprob": "student", "teacher/logprob": "teacher"},
    "Drift from the base model": {"student/drift_kl": "KL"},
    "What the context teaches": {
        "teacher/context_kl": "right context",
        "teacher/leak_kl": "another prompt's",
        "teacher/content_kl": "between the two",
    },
    "Leak ratio": {"teacher/leak_ratio": "ratio"},
    "Top-k support": {
        "distillation/student_mass": "student's mass",
        "distillation/teacher_mass": "teacher's mass",
        "distillation/overlap_ratio": "overlap",
    },
    "Completion length": {"completions/mean_length": "mean"},
    "Student's pass": {"prefix/student_tokens": "computed", "prefix/student_naive_tokens": "without sharing"},
    "Teacher's pass": {"prefix/teacher_tokens": "computed", "prefix/teacher_naive_tokens": "without sharing"},
    "Speedup by sharing": {"prefix/speedup": "passes", "prefix/step_speedup": "with the output layer"},
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Holds one metric of one run."""

    name: str
    label: str
    x: dict[Axis, list[float]]  # the axes that every line of the run has
    y: list[float]

    @property
    def constant(self) -> bool:
        return len(set(self.y)) == 1


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Holds the series that are read together."""

    title: str
    unit: str
    note: str  # what is to be read from it
    series: tuple[Series, ...]

    @property
    def axes(self) -> list[Axis]:
        """Lists what it can be drawn over."""
        return [axis for axis in AXES if all(axis in series.x for series in self.series)]


class Point(NamedTuple):
    """Averages a bucket of consecutive values."""

    x: float
    y: float  # mean
    least: float
    most: float


class Change(NamedTuple):
    """Holds a metric at the start and at the end of a run."""

    key: Key
    first: float
    last: float
    lines: int  # how many have it

    @property
    def verdict(self) -> Literal["better", "worse", "moved", "same"]:
        if math.isclose(self.first, self.last, rel_tol=1e-3, abs_tol=1e-12):
            return "same"
        if self.key.direction not in ("up", "down"):
            return "moved"
        return "better" if (self.last > self.first) == (self.key.direction == "up") else "worse"


def key_for(name: str) -> Key:
    """Returns the table's entry, or one for a name that it does not have."""
    return key_of(name) or Key(name, "Not in the table of metrics.", "", "none", OTHER, name)


def series_of(run: RunData, *, label: str | None = None) -> dict[str, Series]:
    """Returns every metric of a run that has a number on some line. `label` None: the metric's own title."""
    axes = [axis for axis in AXES if run.metrics and all(is_number(row.get(axis)) for row in run.metrics)]
    values: dict[str, tuple[dict[Axis, list[float]], list[float]]] = {}
    for row in run.metrics:
        for name, value in row.items():
            if name in RESERVED or not is_number(value):
                continue
            x, y = values.setdefault(name, ({axis: [] for axis in axes}, []))
            y.append(float(value))
            for axis in axes:
                x[axis].append(float(row[axis]))
    return {name: Series(name=name, label=label or key_for(name).title, x=x, y=y) for name, (x, y) in values.items()}


def charts_by_topic(runs: Sequence[tuple[str, RunData]]) -> dict[str, list[Chart]]:
    """Groups the metrics of one run that belong together; several runs have a chart per metric, a line per run."""
    if len(runs) == 1:
        charts = _together(series_of(runs[0][1]))
    else:
        charts = _compared([series_of(run, label=label) for label, run in runs])
    topics: dict[str, list[Chart]] = {topic: [] for topic in (*TOPICS, OTHER)}
    for chart in charts:
        topics[key_for(chart.series[0].name).topic].append(chart)
    return {topic: charts for topic, charts in topics.items() if charts}


def constants_of(runs: Sequence[tuple[str, RunData]]) -> list[Change]:
    """Lists the metrics that never changed, and so have no chart; of several runs none."""
    if len(runs) != 1:
        return []
    drawn = {series.name for charts in charts_by_topic(runs).values() for chart in charts for series in chart.series}
    return [change for name, change in changes_of(runs[0][1]).items() if name not in drawn]


def changes_of(run: RunData) -> dict[str, Change]:
    """Compares the first of every metric with its last: by name, in the order of the table."""
    order = {topic: i for i, topic in enumerate((*TOPICS, OTHER))}
    ordered = sorted(series_of(run).values(), key=lambda series: order[key_for(series.name).topic])
    return {series.name: Change(key_for(series.name), *first_and_last(series.y), len(series.y)) for series in ordered}


def first_and_last(values: Sequence[float]) -> tuple[float, float]:
    """Averages over both ends of a series, which do not overlap where it has two values or more."""
    count = min(MOST_AT_ENDS, max(1, int(len(values) * ENDS)))
    return fmean(values[:count]), fmean(values[-count:])


def reduced(series: Series, axis: Axis) -> list[Point]:
    """Averages a series to at most `MOST_POINTS` points, in the order of the log."""
    size = math.ceil(len(series.y) / MOST_POINTS)
    buckets = [slice(start, start + size) for start in range(0, len(series.y), size)]
    ys = [series.y[bucket] for bucket in buckets]
    return [Point(fmean(series.x[axis][at]), fmean(y), min(y), max(y)) for at, y in zip(buckets, ys, strict=True)]


def draw(chart: Chart, axis: Axis, axes: Axes) -> None:
    """Draws a chart, without its title, over one of the axes that its series have."""
    curves = [reduced(series, axis) for series in chart.series]
    for series, points in zip(chart.series, curves, strict=True):
        x, y, least, most = zip(*points, strict=True)
        marker = "o" if len(points) <= MARKED else ""
        line(axes, x, y, band=(least, most) if least != most else None, label=series.label, marker=marker)
    axes.set_xlabel(AXIS_TITLES[axis])
    count_on_x(axes)
    low, high = min(p.least for points in curves for p in points), max(p.most for points in curves for p in points)
    if chart.unit == "share":
        axes.yaxis.set_major_formatter(lambda value, _: shown(value, "share"))
    if chart.unit == "share" and low >= 0 and 0.5 < high <= 1:
        axes.set_ylim(-0.02, 1.02)
    elif 0 <= low < 0.6 * high:  # from 0 on where that does not squeeze what there is to see
        axes.set_ylim(bottom=0)


def is_number(value: Any) -> bool:
    """Is true for a finite number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: float | None, unit: str = "") -> str:
    """Writes a number as it is read: three digits, shares in percent."""
    if value is None:
        return "–"
    if unit == "share":
        percent = 100 * value
        return f"{percent:.0f} %" if percent == round(percent) or abs(percent) >= 10 else f"{percent:.2g} %"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _together(series: dict[str, Series]) -> Iterable[Chart]:
    left = dict(series)
    for title, names in TOGETHER.items():
        members = [replace(left[name], label=label) for name, label in names.items() if name in left]
        # A line along the bottom says nothing beside others. A single value is no constant: it is drawn as a dot.
        members = [member for member in members if set(member.y) != {0.0}] or members
        if any(not member.constant or len(member.y) == 1 for member in members):
            yield _chart(title, tuple(members))
            for member in members:
                del left[member.name]
    for alone in left.values():
        if not alone.constant:
            yield _chart(_sentence(key_for(alone.name).title), (alone,))


def _compared(runs: Sequence[dict[str, Series]]) -> Iterable[Chart]:
    names = dict.fromkeys([*(name for names in TOGETHER.values() for name in names), *(n for run in runs for n in run)])
    for name in names:
        of_runs = tuple(run[name] for run in runs if name in run)
        if len({y for series in of_runs for y in series.y}) > 1:
            yield _chart(_sentence(key_for(name).title), of_runs)


def _chart(title: str, series: tuple[Series, ...]) -> Chart:
    key = key_for(series[0].name)
    return Chart(title=title, unit=key.unit, note=key.meaning, series=series)


def _sentence(title: str) -> str:
    return title[:1].upper() + title[1:]
