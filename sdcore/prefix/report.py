"""Says what was run and why, in numbers for a log and in a paragraph for a person.

Everything here is known from the plan, its cost and the choice of the strategy: nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .costs.count import Cost, PassCost
from .planner import Plan
from .tree import Tree

# Below this share of a student's prompt, a teacher that could read its states hardly does: say so.
LITTLE_SHARED = 0.5


class Fallback(NamedTuple):
    """Names a strategy that was not taken, although it was wanted."""

    strategy: str
    reason: str


class Choice(NamedTuple):
    """Says how a pass is run: what was chosen, and why."""

    strategy: str
    reason: str = ""
    padding: float = 0.0  # share of its batches' tokens that are padding


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """Describes one pass. `naive_…` is with every completion a sequence of its own; tokens are without padding."""

    strategy: str
    reason: str  # why this strategy, as a clause; may be empty
    padding: float  # share of the batches' tokens that are padding
    tokens: int
    naive_tokens: int
    depth: int  # of the trees: how many branchings come before the last tokens
    flops: int | None  # None where the model's configuration does not say what a layer costs
    naive_flops: int | None

    def sentence(self, name: str) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        text = f"{name} pass: {self.strategy}{reason}, {self.tokens:,} tokens"
        if self.tokens == self.naive_tokens:
            text += ", as many as a naive pass computes"
        else:
            text += f" where a naive pass computes {self.naive_tokens:,}"
        if self.depth > 1:
            text += f" (trees of depth {self.depth})"
        if self.flops and self.naive_flops and self.tokens != self.naive_tokens:
            text += f", {_times(self.naive_flops / self.flops)} fewer FLOPs"
        if self.padding > 0:
            text += f", {_percent(self.padding)} of its batches is padding"
        return text + "."


@dataclass(frozen=True, kw_only=True)
class Report:
    """Says what the passes over a plan shared, and how they were run. `str(report)` is for reading."""

    student: PassReport
    teachers: tuple[PassReport, ...]  # of each that is told apart; none for a plan without
    teacher_shares: bool  # the last teacher has the student's weights and read its states
    shared_tokens: tuple[int, ...]  # per group: tokens that the student's and the teacher's prompts begin with alike
    prompt_tokens: tuple[int, ...]  # per group: tokens of the student's prompt; of trees of turns all tokens
    fallbacks: tuple[Fallback, ...]
    speedup: float | None  # naive FLOPs over FLOPs, both passes, without the lm_head; None where FLOPs are not known
    step_speedup: float | None  # the same with the lm_head, which sharing does not change

    @classmethod
    def of(
        cls,
        plan: Plan,
        cost: Cost | None,
        *,
        student: Choice,
        teachers: Sequence[Choice] = (),
        teacher_shares: bool = False,
        fallbacks: Sequence[Fallback] = (),
    ) -> Report:
        """Makes the report; `cost` is that of a strategy that shares, None where the configuration says too little.

        `teachers` (): run as the student's pass. `teacher_shares`: as in `cost`; a naive pass reads nothing anyway.
        """
        # Any pass may have fallen back to naive alone.
        sides = plan.sides(teacher_shares=teacher_shares)
        choices = [student, *(teachers or [student] * len(plan.teachers))]
        costs = [cost.student, *cost.teachers] if cost else [None] * len(sides)
        passes = [
            _pass_report(choice, trees, counted, read_shared=reads)
            for choice, (trees, reads), counted in zip(choices, sides, costs, strict=True)
        ]
        flops, naive = sum(p.flops or 0 for p in passes), sum(p.naive_flops or 0 for p in passes)
        head = cost.head_flops if cost else 0
        return cls(
            student=passes[0],
            teachers=tuple(passes[1:]),
            teacher_shares=teacher_shares,
            shared_tokens=tuple(tree.shared for tree in sides[-1][0]) if plan.teachers else (),
            prompt_tokens=tuple(map(_prompt_tokens, plan.student)),
            fallbacks=tuple(fallbacks),
            speedup=naive / flops if naive and flops else None,
            step_speedup=(naive + head) / (flops + head) if naive and flops else None,
        )

    @property
    def teacher(self) -> PassReport | None:
        """Describes the last teacher's pass, the one that may read the student's states."""
        return self.teachers[-1] if self.teachers else None

    @property
    def shared_fractions(self) -> tuple[float, ...]:
        """Says per group which share of the student's prompt the teacher's begin with; () without a teacher.

        0 for a group of which nothing is computed.
        """
        return tuple(shared / max(1, self.prompt_tokens[g]) for g, shared in enumerate(self.shared_tokens))

    @property
    def _shared_fraction(self) -> float:
        return sum(self.shared_tokens) / max(1, sum(self.prompt_tokens))

    @property
    def metrics(self) -> dict[str, float]:
        """Names for a log only what is known, under `prefix/`."""
        numbers: dict[str, float | None] = {
            "prefix/speedup": self.speedup,
            "prefix/step_speedup": self.step_speedup,
            "prefix/fallbacks": float(len(self.fallbacks)),
        }
        for name, reports in (("student", (self.student,)), ("teacher", self.teachers)):
            if reports:
                numbers[f"prefix/{name}_tokens"] = float(sum(report.tokens for report in reports))
                numbers[f"prefix/{name}_naive_tokens"] = float(sum(report.naive_tokens for report in reports))
                numbers[f"prefix/{name}_padding"] = max(report.padding for report in reports)
        if self.shared_tokens:
            numbers["prefix/shared_fraction"] = self._shared_fraction
        return {name: value for name, value in numbers.items() if value is not None}

    def __str__(self) -> str:
        sentences = [self.student.sentence("Student")]
        for number, teacher in enumerate(self.teachers):
            sentences.append(teacher.sentence("Teacher" if len(self.teachers) == 1 else f"Teacher {number}"))
        if self.teachers:
            sentences.append(self._about_shared())
        if self.speedup is not None and self.step_speedup is not None:
            sentences.append(
                f"Together {_times(self.speedup)} fewer FLOPs than naive, {_times(self.step_speedup)} with the lm_head."
            )
        sentences += [f"Not {fallback.strategy}: {fallback.reason}." for fallback in self.fallbacks]
        return " ".join(sentences)

    def _about_shared(self) -> str:
        fractions, mean = self.shared_fractions, self._shared_fraction
        text = f"The teacher's prompts begin with {_percent(mean)} of the student's"
        if self.student.depth > 1:
            text = f"The teacher's views begin with {_percent(mean)} of the student's tokens"
        if max(fractions) - min(fractions) > 0.01:
            text += f" ({_percent(min(fractions))} to {_percent(max(fractions))} over {len(fractions)} groups)"
        if not self.teacher_shares:
            return text + ", but it has other weights and computed them itself."
        if self.teacher is not None and self.teacher.strategy == "naive":
            return text + ", but a naive pass computed them again."
        if mean < LITTLE_SHARED:
            return text + ", which it read from the student's pass: context that comes later in the prompt shares more."
        return text + ", which it read from the student's pass."


def _pass_report(choice: Choice, trees: Sequence[Tree], cost: PassCost | None, *, read_shared: bool) -> PassReport:
    naive_tokens, naive_flops = sum(tree.naive_tokens() for tree in trees), cost.naive_flops if cost else None
    naive = choice.strategy == "naive"
    return PassReport(
        strategy=choice.strategy,
        reason=choice.reason,
        padding=choice.padding,
        tokens=naive_tokens if naive else sum(tree.tokens(read_shared=read_shared) for tree in trees),
        naive_tokens=naive_tokens,
        depth=max((tree.depth for tree in trees), default=0),
        flops=cost.flops if cost and not naive else naive_flops,
        naive_flops=naive_flops,
    )


def _prompt_tokens(tree: Tree) -> int:
    """Counts the tokens of a prompt, of which no state but the last is asked for; else those of the whole tree."""
    if len(tree.children[-1]) == 1 and not bool((tree.rows < len(tree.spans[0]) - 1).any()):
        return len(tree.spans[0])
    return tree.starts[-1]


def _times(factor: float) -> str:
    return f"{factor:.1f}×"


def _percent(share: float) -> str:
    """Shows a share that is not nothing never as 0 %."""
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.01 else "less than 1 %"
