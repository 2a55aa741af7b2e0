"""From the lines of a run's log to what a report draws: series, charts by topic, and first against last.

A run of thousands of steps is reduced to a few hundred points: each is the mean of its bucket, with the least and the
greatest value beside it, so that a single spike is still seen. Metrics that never changed are no chart but a line of
text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

from ..diagnostics import RunData, key_of
from ..diagnostics.keys import OTHER, TOPICS, Key
from ..diagnostics.runlog import RESERVED

Axis = Literal["step", "samples", "tokens"]
AXES: Final[tuple[Axis, ...]] = ("step", "samples", "tokens")
AXIS_TITLES: Final[dict[Axis, str]] = {
    "step": "optimizer step",
    "samples": "completions",
    "tokens": "completion tokens",
}
MOST_POINTS: Final = 240
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
    """One metric of one run."""

    name: str
    label: str
    x: dict[Axis, list[float]]  # the axes that every line of the run has
    y: list[float]

    @property
    def constant(self) -> bool:
        return len(set(self.y)) == 1


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    unit: str
    note: str  # what is to be read from it
    series: tuple[Series, ...]


class Point(NamedTuple):
    """A bucket of consecutive values."""

    x: float
    y: float  # mean
    least: float
    most: float


class Change(NamedTuple):
    """A metric at the start and at the end of a run."""

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
    """The table's entry, or one for a name that it does not have."""
    return key_of(name) or Key(name, "Not in the table of metrics.", "", "none", OTHER, name)


def series_of(run: RunData, *, label: str | None = None) -> dict[str, Series]:
    """Every metric of a run that has a number on some line. `label` None: the metric's own title."""
    axes = [axis for axis in AXES if run.metrics and all(is_number(line.get(axis)) for line in run.metrics)]
    found: dict[str, tuple[dict[Axis, list[float]], list[float]]] = {}
    for line in run.metrics:
        for name, value in line.items():
            if name in RESERVED or not is_number(value):
                continue
            x, y = found.setdefault(name, ({axis: [] for axis in axes}, []))
            y.append(float(value))
            for axis in axes:
                x[axis].append(float(line[axis]))
    return {name: Series(name=name, label=label or key_for(name).title, x=x, y=y) for name, (x, y) in found.items()}


def charts_by_topic(runs: Sequence[tuple[str, RunData]]) -> dict[str, list[Chart]]:
    """Of one run, metrics that belong together in one chart; of several, a chart per metric with a line per run."""
    if len(runs) == 1:
        charts = _together(series_of(runs[0][1]))
    else:
        charts = _compared([series_of(run, label=label) for label, run in runs])
    topics: dict[str, list[Chart]] = {topic: [] for topic in (*TOPICS, OTHER)}
    for chart in charts:
        topics[key_for(chart.series[0].name).topic].append(chart)
    return {topic: found for topic, found in topics.items() if found}


def constants_of(runs: Sequence[tuple[str, RunData]]) -> list[Change]:
    """The metrics that never changed, and so have no chart."""
    if len(runs) != 1:
        return []
    drawn = {one.name for charts in charts_by_topic(runs).values() for chart in charts for one in chart.series}
    return [change for change in changes_of(runs[0][1]) if change.key.name not in drawn]


def changes_of(run: RunData) -> list[Change]:
    """Every metric, first against last, in the order of the table."""
    order = {topic: i for i, topic in enumerate((*TOPICS, OTHER))}
    changes = [
        Change(key_for(name), *first_and_last(series.y), len(series.y)) for name, series in series_of(run).items()
    ]
    return sorted(changes, key=lambda change: order[change.key.topic])


def first_and_last(values: Sequence[float]) -> tuple[float, float]:
    """Means over the ends of a series, which do not overlap where it has two values or more."""
    count = min(MOST_AT_ENDS, max(1, int(len(values) * ENDS)))
    return _mean(values[:count]), _mean(values[-count:])


def reduced(series: Series, axis: Axis, most: int = MOST_POINTS) -> list[Point]:
    """At most so many points, in the order of the log; values of one place on the axis are one point."""
    size = math.ceil(len(series.y) / most)
    points: list[Point] = []
    pairs = list(zip(series.x[axis], series.y, strict=True))
    for start in range(0, len(pairs), size):
        bucket = pairs[start : start + size]
        ys = [y for _, y in bucket]
        points.append(Point(_mean([x for x, _ in bucket]), _mean(ys), min(ys), max(ys)))
    return points


def smoothed(values: Sequence[float], *, over: int) -> list[float]:
    """Mean of each value and its neighbours, `over` in all; fewer, but as many on each side, at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(over // 2, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def is_smooth(values: Sequence[float]) -> bool:
    """Whether it goes up and down so little that smoothing would only bend it, as a learning rate."""
    way = sum(abs(after - before) for before, after in pairwise(values))
    return way <= 3 * (max(values) - min(values))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: float | None, unit: str = "") -> str:
    """A number as it is read: three digits, shares in percent."""
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
        found = [replace(left[name], label=label) for name, label in names.items() if name in left]
        # A line along the bottom says nothing beside others. A single value is no constant: it is drawn as a dot.
        found = [one for one in found if set(one.y) != {0.0}] or found
        if any(not one.constant or len(one.y) == 1 for one in found):
            yield _chart(title, tuple(found))
            left = {name: one for name, one in left.items() if name not in {other.name for other in found}}
    for one in left.values():
        if not one.constant:
            yield _chart(_sentence(key_for(one.name).title), (one,))


def _compared(runs: Sequence[dict[str, Series]]) -> Iterable[Chart]:
    names = dict.fromkeys([*(name for names in TOGETHER.values() for name in names), *(n for run in runs for n in run)])
    for name in names:
        found = tuple(run[name] for run in runs if name in run)
        if found and len({y for one in found for y in one.y}) > 1:
            yield _chart(_sentence(key_for(name).title), found)


def _chart(title: str, series: tuple[Series, ...]) -> Chart:
    key = key_for(series[0].name)
    return Chart(title=title, unit=key.unit, note=key.meaning, series=series)


def _sentence(title: str) -> str:
    return title[:1].upper() + title[1:]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


__all__ = [
    "AXES", "AXIS_TITLES", "Axis", "Change", "Chart", "Point", "Series", "changes_of", "charts_by_topic",
    "constants_of", "first_and_last", "is_number", "is_smooth", "key_for", "reduced", "series_of", "shown", "smoothed",
]  # fmt: skip
