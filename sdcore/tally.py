"""The metrics of several batches, steps and ranks as one line of the log.

    tally.add(metrics(groups, conditioned, out)); ...; line = tally.drain(accelerator)

A count is added up over everything since the last line. The step's loss is added up over the batches of a step, since
each is its part of it, and averaged over ranks and steps. Everything else is a mean over those that have it.

Not covered: means that weigh batches by their size; batches of a step are of equal size but for the last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

from accelerate.utils import gather_object  # type: ignore[import-untyped, unused-ignore]

from .contexts.builders import COUNTS

SUMS: Final = frozenset({*COUNTS, "loss/active_tokens"})
# Parts of the step's loss: what the batches say adds up.
LOSSES: Final = frozenset({"self_distillation/distillation_loss", "loss/distillation", "loss/policy"})


class Tally:
    """Adds up what is said between two lines of the log."""

    def __init__(self, counts: Collection[str] = ()) -> None:
        self._counts = SUMS | set(counts)
        self._totals: dict[str, tuple[float, int]] = {}  # sum, number
        self._steps = 0

    def count(self, values: Mapping[str, int]) -> None:
        """Numbers that are added up, whatever they are called."""
        self._counts |= set(values)
        self.add(values)

    def add(self, values: Mapping[str, float]) -> None:
        """What a batch says."""
        for name, value in values.items():
            total, number = self._totals.get(name, (0.0, 0))
            self._totals[name] = total + float(value), number + 1

    def step(self) -> None:
        """A step is over."""
        self._steps += 1

    def drain(self) -> dict[str, float]:
        """One line of all ranks, which all must call this; empty afterwards."""
        mine: list[Any] = [(self._totals, sorted(self._counts), self._steps)]
        ranks = gather_object(mine)
        self._totals, self._steps = {}, 0
        counts = {name for _, names, _ in ranks for name in names}
        steps = max(1, max(number for _, _, number in ranks))
        line: dict[str, float] = {}
        for name in dict.fromkeys(name for totals, _, _ in ranks for name in totals):
            parts = [totals[name] for totals, _, _ in ranks if name in totals]
            total = math.fsum(part for part, _ in parts) if all(math.isfinite(p) for p, _ in parts) else math.nan
            if name in counts:
                line[name] = total
            elif name in LOSSES:
                line[name] = total / (len(ranks) * steps)
            else:
                line[name] = total / sum(number for _, number in parts)
        return line


__all__ = ["LOSSES", "Tally"]
