"""Says what a study is and what a run of it leaves behind, and turns numbers into a verdict.

A *study* compares *arms* on the same seeds. A *job* is one arm with one learning rate and one seed; its *record* is a
line of `<study>.jsonl` and holds what was measured at each checkpoint. Everything that is printed is computed from the
records, so that tables and plots can be made anew without a run.

What differs from the obvious: arms are compared seed by seed, because a seed fixes the task and the questions and that
difference is known better than each arm alone; and an effect counts as reproduced from three standard errors on, since
five seeds leave four degrees of freedom and two standard errors would be too few.

Not covered: choosing the learning rates and running the jobs (`table`), what is measured (`experiment` and the claims).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from sdcore.errors import ArgumentError

# What was measured at a checkpoint: "step", "samples", "tokens" and the study's own quantities.
Point: TypeAlias = dict[str, float]
# From the points of a run to one number; None where the run does not have it, such as a level that it never reached.
Quantity: TypeAlias = Callable[[Sequence[Point]], float | None]
# From the points of a run, a quantity's name and a level to where the run has it.
Place: TypeAlias = Callable[[Sequence[Point], str, float], Point | None]

TUNING_SEED = 1_000  # learning rates are chosen on it alone; it is never among the reported seeds
ENOUGH = 3.0  # standard errors


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Is one of the things that a study compares. Each claim's file adds the fields that tell its arms apart."""

    name: str  # in files
    title: str  # in tables
    learning_rates: tuple[float, ...] = (5e-5, 1e-4, 3e-4)  # the grid; a single one is not tuned
    rate_of: str | None = None  # "study/arm" whose chosen rate it takes, as a control does; None: its own
    runs_of: str | None = None  # study that has an arm of this name, whose runs these are; None: its own
    quick_rate: float | None = None  # its rate in the quick subset; None: it is not part of that


class Column(NamedTuple):
    """Puts the mean over seeds of a quantity into the table."""

    title: str
    quantity: Quantity
    digits: int = 2


class Panel(NamedTuple):
    """Plots the arms' means over seeds, with their standard error as a band."""

    title: str
    y: str  # name of a quantity in the points
    x: str = "samples"
    log_y: bool = False
    log_x: bool = False


@dataclass(frozen=True, kw_only=True)
class Study:
    """Compares arms, with all that is needed to run them, print them and judge them."""

    name: str
    claim: str  # what several studies have in common: "sdft", "sdpo", "tilt", "discovery", "context"; else, the name
    title: str
    claimed: str  # what is to be reproduced, in words
    arms: tuple[Any, ...]  # of Arm
    full: Any  # settings, a frozen dataclass of the study's own; recorded with each run
    quick: Any
    run: Callable[[Any, Any, float, int], list[Point]]  # arm, settings, learning rate, seed
    rule: str  # how a learning rate is chosen, in words
    choose: Callable[[Mapping[float, Sequence[Point]]], float]  # the same: from the tuning runs to a rate
    columns: tuple[Column, ...]
    panels: tuple[Panel, ...]
    judge: Callable[[Results], list[Verdict]]
    notes: str = ""  # printed below the table
    group: Literal["small", "real"] = "small"  # the models that it is about; each group has a page
    more: Callable[[Results], list[str]] = lambda results: []  # lines of Markdown below the notes

    def arm(self, name: str) -> Any:
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Names a run that is to be made, or was."""

    study: str
    arm: str
    learning_rate: float
    seed: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Is equal for equal runs; other settings are another run."""
        return json.dumps(asdict(self) | {"settings": dict(self.settings)}, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Record:
    job: Job
    points: list[Point]
    cpu_seconds: float = field(compare=False, default=0.0)

    def to_json(self) -> str:
        """Writes one line; six significant digits are more than any standard error here."""
        points = [{name: float(f"{value:.6g}") for name, value in point.items()} for point in self.points]
        line = asdict(self.job) | {"points": points, "cpu_seconds": round(self.cpu_seconds, 1)}
        return json.dumps(line, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Record:
        values = json.loads(line)
        points, seconds = values.pop("points"), values.pop("cpu_seconds")
        return cls(job=Job(**values), points=points, cpu_seconds=seconds)


class Archive:
    """Keeps the records of a folder: one `<study>.jsonl` per study, appended to as runs are done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        for file in sorted(folder.glob("*.jsonl")):
            kept = []
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                # A line without its end was cut off when a run was killed: that run is made again.
                if line.endswith("\n"):
                    record = Record.from_json(line)
                    self.records[record.job.key] = record
                    kept.append(line)
            file.write_text("".join(kept), encoding="utf-8")

    def add(self, record: Record) -> None:
        self.records[record.job.key] = record
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{record.job.study}.jsonl").open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")

    def keep(self, keys: Iterable[str], owns: Callable[[Job], bool]) -> None:
        """Drops the runs that `owns` is true of, but for these: they come first in their files, in this order."""
        files = {record.job.study for record in self.records.values() if owns(record.job)}
        others = {key: record for key, record in self.records.items() if not owns(record.job)}
        self.records = {key: self.records[key] for key in keys} | others
        for study in files:
            lines = [record.to_json() + "\n" for record in self.records.values() if record.job.study == study]
            new = self.folder / f"{study}.jsonl.new"
            new.write_text("".join(lines), encoding="utf-8")
            new.replace(self.folder / f"{study}.jsonl")  # at once: hours of work, should this be killed here


class Estimate(NamedTuple):
    """Is a mean over seeds with its standard error."""

    mean: float
    error: float
    seeds: int  # that have the quantity
    of: int  # seeds in all


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Computes mean and standard error (sample deviation / √n) of what is there; None where nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    variance = sum((value - mean) ** 2 for value in known) / max(1, len(known) - 1)
    return Estimate(mean, sqrt(variance / len(known)), len(known), len(values))


@dataclass(frozen=True)
class Results:
    """Holds the reported runs of a study."""

    records: dict[str, dict[int, Record]]  # arm → seed → record
    resolution: float  # the least standard error of a difference: what one answer more or less changes

    def values(self, arm: str, quantity: Quantity) -> list[float | None]:
        return [quantity(record.points) for _, record in sorted(self.records[arm].items())]

    def estimate(self, arm: str, quantity: Quantity) -> Estimate | None:
        return estimate(self.values(arm, quantity))

    def difference(
        self, first: str, second: str, quantity: Quantity, *, resolution: float | None = None
    ) -> Estimate | None:
        """Subtracts second from first, seed by seed, over the seeds where both have the quantity."""
        pairs = list(zip(self.values(first, quantity), self.values(second, quantity), strict=True))
        effect = estimate([None if a is None or b is None else a - b for a, b in pairs])
        return None if effect is None else effect._replace(error=max(effect.error, resolution or self.resolution))


class Verdict(NamedTuple):
    outcome: Literal["reproduced", "not reproduced", "opposite", "undecided"]
    sentence: str


def compare(
    results: Results,
    statement: str,
    first: str,
    second: str,
    quantity: Quantity,
    *,
    margin: float = 0.0,
    resolution: float | None = None,
    digits: int = 3,
) -> Verdict:
    """Judges "first is greater than second by more than `margin`", seed by seed.

    `resolution` is the least standard error of the difference; None: one answer more or less.

    Reproduced from three standard errors on; opposite when second is greater by as many; not reproduced in between; and
    undecided when fewer than two seeds have both numbers, as where an arm never reaches the level at which it is read.
    """
    mean = {name: results.estimate(name, quantity) for name in (first, second)}
    effect = results.difference(first, second, quantity, resolution=resolution)
    shown = " against ".join(
        "never reached" if value is None else f"{value.mean:.{digits}f} ± {value.error:.{digits}f}"
        for value in mean.values()
    )
    if effect is None or effect.seeds < 2:
        return Verdict("undecided", f"{statement}: {shown}; too few seeds reach what is to be compared.")
    distance = (effect.mean - margin) / effect.error
    if distance >= ENOUGH:
        outcome: Literal["reproduced", "not reproduced", "opposite"] = "reproduced"
    elif (effect.mean + margin) / effect.error <= -ENOUGH:
        outcome = "opposite"
    else:
        outcome = "not reproduced"
    sign = f"difference {effect.mean:+.{digits}f} ± {effect.error:.{digits}f}, {abs(effect.mean) / effect.error:.1f} SE"
    seeds = "" if effect.seeds == effect.of else f", in the {effect.seeds} of {effect.of} seeds that have both"
    beyond = f", more than {margin:g} claimed" if margin else ""
    rates = [next(iter(results.records[name].values())).job.learning_rate for name in (first, second)]
    # Speed at unequal rates is the choice's doing as much as the method's, so it is said.
    unequal = f", at rates {rates[0]:g} and {rates[1]:g}" if rates[0] != rates[1] else ""
    return Verdict(outcome, f"{statement}: {shown} ({sign}{beyond}{seeds}{unequal}).")


def exceeds(
    results: Results, statement: str, arm: str, quantity: Quantity, level: float, *, digits: int = 2
) -> Verdict:
    """Judges "the arm's quantity is greater than `level`", by three standard errors as `compare` does."""
    value = results.estimate(arm, quantity)
    if value is None or value.seeds < 2:
        return Verdict("undecided", f"{statement}: too few seeds have it.")
    error = max(value.error, results.resolution)
    distance = (value.mean - level) / error
    shown = f"{value.mean:.{digits}f} ± {error:.{digits}f}, {level:g} is claimed ({abs(distance):.1f} SE)"
    outcome: Literal["reproduced", "not reproduced", "opposite"] = "not reproduced"
    if abs(distance) >= ENOUGH:
        outcome = "reproduced" if distance > 0 else "opposite"
    return Verdict(outcome, f"{statement}: {shown}.")


def first_at(points: Sequence[Point], name: str, level: float) -> Point | None:
    """Finds the first checkpoint where a quantity is at least `level`: there arms of unequal speed are compared."""
    return next((point for point in points if point[name] >= level), None)


def crossing(points: Sequence[Point], name: str, level: float) -> Point | None:
    """Returns the point where a quantity comes to `level`, on the line between the checkpoints around it.

    It is for measurements that are dear, and therefore few. What only one of the two has is left out.
    """
    index = next((i for i, point in enumerate(points) if point[name] >= level), None)
    if index is None or index == 0:
        return None if index is None else points[0]
    before, after = points[index - 1], points[index]
    share = (level - before[name]) / (after[name] - before[name])
    return {key: before[key] + share * (after[key] - before[key]) for key in before if key in after}


def matched(name: str, by: str, level: float, *, at: Place = first_at) -> Quantity:
    """Reads a quantity at the first checkpoint where `by` is at least `level`; another `at` reads it elsewhere."""

    def read(points: Sequence[Point]) -> float | None:
        point = at(points, by, level)
        return None if point is None else point[name]

    return read


def final(name: str) -> Quantity:
    """Reads a quantity at the last checkpoint."""
    return lambda points: points[-1][name]


def needed(by: str, level: float, *, cost: str = "samples") -> Quantity:
    """Reads what reaching the level cost; a run that never does counts as its whole budget, which is too kind to it."""

    def read(points: Sequence[Point]) -> float:
        return (first_at(points, by, level) or points[-1])[cost]

    return read


def at_step(name: str, step: int) -> Quantity:
    """Reads a quantity after so many steps."""
    return lambda points: next((point[name] for point in points if point["step"] == step), None)


def sparing(
    by: str, level: float, keeps: Sequence[str], *, at: Place = first_at
) -> Callable[[Mapping[float, Sequence[Point]]], float]:
    """Chooses the rate that keeps most, in the mean of `keeps`, at the first checkpoint where `by` is at least `level`.

    Among rates within 0.01 of the best it is the one that needs fewest samples; where none reaches the level, the one
    with the highest `by` at its end. Another `at` reads elsewhere than at the first checkpoint.
    """

    def choose(runs: Mapping[float, Sequence[Point]]) -> float:
        reached = {rate: point for rate, points in runs.items() if (point := at(points, by, level)) is not None}
        if not reached:
            return max(runs, key=lambda rate: runs[rate][-1][by])
        kept = {rate: sum(point[name] for name in keeps) / len(keeps) for rate, point in reached.items()}
        good = [rate for rate in reached if kept[rate] >= max(kept.values()) - 0.01]
        return min(good, key=lambda rate: (reached[rate]["samples"], -kept[rate]))

    return choose


def fastest(by: str, level: float) -> Callable[[Mapping[float, Sequence[Point]]], float]:
    """Chooses the rate that first reaches the level; among equals, or where none does, the highest `by` at the end."""

    def choose(runs: Mapping[float, Sequence[Point]]) -> float:
        def badness(rate: float) -> tuple[float, float]:
            point = first_at(runs[rate], by, level)
            return (float("inf") if point is None else point["samples"], -runs[rate][-1][by])

        return min(runs, key=badness)

    return choose


def checked_seeds(seeds: int) -> tuple[int, ...]:
    """Returns the reported seeds. Raises `ArgumentError` for a number that has no standard error."""
    if not 2 <= seeds < TUNING_SEED:
        raise ArgumentError(f"seeds must be in [2, {TUNING_SEED}), a standard error needs two, got {seeds}")
    return tuple(range(seeds))
