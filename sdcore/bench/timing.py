"""The times of rows that take turns, so that a disturbance of the machine hits all alike.

Every row gets about the same time, hence the fast ones more repetitions, spread evenly over the rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .oracle import Errors

# Repetitions of a row. One that takes `SLOW` times as long as the fastest is no rival, and gets one less.
LEAST_REPETITIONS, MOST_REPETITIONS = 3, 15
SLOW = 3.0
# The bare products of a head that is trained, and of one that is frozen, which has no gradient.
FLOOR, FROZEN_FLOOR = "four matmuls", "three matmuls"
FLOORS = (FLOOR, FROZEN_FLOOR)


@dataclass(kw_only=True)
class SpeedRow:
    """A contender in a group: its times, or why there are none. The floors are rows of their own."""

    group: Any  # the suite's case
    contender: str
    setting: str = ""
    seconds: list[float] = field(default_factory=list)
    errors: Errors | None = None  # None for a floor, and for a row that did not run
    reason: str | None = None  # why it was not timed

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        if len(self.seconds) < 2:
            return math.nan
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, to the end of the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    steps: Sequence[tuple[SpeedRow, Callable[[], object]]], device: torch.device, seconds_per_row: float
) -> None:
    """Time every step once, then again for about so many seconds a row; the rows take turns."""
    for row, step in steps:
        row.seconds.append(timed(step, device))
    fastest = min(row.seconds[0] for row, _ in steps)
    more = [repetitions(row.seconds[0], fastest, seconds_per_row) - 1 for row, _ in steps]
    rounds = max(more)
    for i in range(rounds):
        for (row, step), turns in zip(steps, more, strict=True):
            if (i + 1) * turns // rounds > i * turns // rounds:
                row.seconds.append(timed(step, device))


def repetitions(seconds: float, fastest: float, seconds_per_row: float) -> int:
    """How often to time a row that took `seconds`, where the fastest of its group took `fastest`. 0 a row: once."""
    if not seconds_per_row:
        return 1
    least = LEAST_REPETITIONS if seconds < SLOW * fastest else LEAST_REPETITIONS - 1
    return min(MOST_REPETITIONS, max(least, round(seconds_per_row / seconds)))


def error_line(error: Exception) -> str:
    """The kind of an error and the first line of its text: the reason of a row."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


__all__ = ["FLOOR", "FLOORS", "FROZEN_FLOOR", "SpeedRow", "error_line", "repetitions", "take_turns", "timed"]
