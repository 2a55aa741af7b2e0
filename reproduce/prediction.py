"""Compares what a context promises of each fact before training with what was learned of it.

The prediction is `gain`: by how much the context raises the log-probability of the right words of an answer, before
anything is learned. What happened is the share of held-out questions about the fact that are answered right after
training, over all seeds. The two are compared by rank, and the chance of such a correlation or a greater one by
permuting facts.

What differs from the obvious: the judge asks for a chance as small as that of three standard errors. Two other
predictors stand beside it, which cost less: the log-probability with the context in view (`view`), and the share of the
questions to learn from that the teacher answers right (`taught`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import erfc, sqrt
from typing import Final, NamedTuple

from .records import ENOUGH, Results, Verdict

PREDICTORS: Final = {
    "gain": "gain in log-probability by the context",
    "view": "log-probability with the context",
    "taught": "share that the teacher answers right",
}
PERMUTATIONS: Final = 20_000
CHANCE: Final = erfc(ENOUGH / sqrt(2))  # of three standard errors on either side


class Correlation(NamedTuple):
    """Is a rank correlation, with the chance of one as far from 0 where there is none."""

    rho: float
    chance: float


def ranks(values: Sequence[float]) -> list[float]:
    """Returns ranks from 0; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranked, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            ranked[i] = (start + end) / 2
        start = end + 1
    return ranked


def correlation(first: Sequence[float], second: Sequence[float], *, permutations: int = PERMUTATIONS) -> Correlation:
    """Returns Spearman's correlation and its chance, over random permutations; 0 where one side is all equal."""
    a, b = (_centred(ranks(values)) for values in (first, second))
    scale = sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    if scale == 0:
        return Correlation(0.0, 1.0)
    rho = sum(x * y for x, y in zip(a, b, strict=True)) / scale
    rng, as_far = random.Random(0), 0
    for _ in range(permutations):
        rng.shuffle(b)
        as_far += abs(sum(x * y for x, y in zip(a, b, strict=True)) / scale) >= abs(rho) - 1e-12
    # The order that was found is one of them.
    return Correlation(rho, (as_far + 1) / (permutations + 1))


def _centred(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value - mean for value in values]


def of_facts(results: Results, arm: str, name: str, index: int) -> list[float]:
    """Returns a quantity of each fact, the mean over seeds, at the first point (0) or the last (-1)."""
    points = [record.points[index] for record in results.records[arm].values()]
    names = sorted(key for key in points[0] if key.startswith(f"{name} "))
    return [sum(point[key] for point in points) / len(points) for key in names]


def predicted(results: Results, arm: str) -> Verdict:
    """Judges that the gain in log-probability tells which facts will be learned."""
    statement = "The gain in log-probability of a right answer by the context, before training, tells which facts are "
    learned = of_facts(results, arm, "fact", -1)
    if len(set(learned)) < 2:
        return Verdict("undecided", f"{statement}learned: all were learned equally.")
    rho, chance = correlation(of_facts(results, arm, "gain", 0), learned)
    said = f"{statement}learned: rank correlation {rho:+.2f} over {len(learned)} facts, chance {chance:.4f}"
    if chance > CHANCE:
        return Verdict("not reproduced", f"{said}, {CHANCE:.4f} is asked for.")
    return Verdict("reproduced" if rho > 0 else "opposite", f"{said}.")


def fact_table(results: Results, *, arm: str) -> list[str]:
    """Writes how each predictor goes with what was learned."""
    learned = of_facts(results, arm, "fact", -1)
    lines = ["| known of a fact before training | rank correlation with what is learned of it | chance |"]
    lines += ["| --- | ---: | ---: |"]
    for name, title in PREDICTORS.items():
        rho, chance = correlation(of_facts(results, arm, name, 0), learned)
        lines.append(f"| {title} | {rho:+.2f} | {chance:.4f} |")
    return [*lines, "", f"Over {len(learned)} facts; what is learned is the share of right held-out answers.", ""]
