"""Runs the loop that all steps share, over the parts of a pass, and holds what a step returns.

Every step's loss is `Σ w·divergence + Σ term(log p(y))`, of which either may be missing: distillation has the first,
the policy gradient the second. A part of the pass gives hidden states; the divergence and the log-probabilities of the
sampled tokens are made of them in tiles, so that the (N, V) logits never exist, and rows without a weight are not
projected at all.

Letters: N rows of the plan, n rows of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from sdkernels import DivergenceOutput, TeacherMix, TopKLogprobs, linear_logprobs
from sdkernels.types import Reduction

from ..losses import FusedLinearDivergence, TokenTilt
from ..models import Head, find_body, head_of
from ..prefix.planner import Plan
from ..prefix.report import Report
from ..prefix.runner import Part, Passes

Backward = Callable[[Tensor], object]
# Metric → the row value that it is the mean of: of a divergence, and of a policy gradient.
MEANS = {
    "student/entropy": "student_entropy",
    "teacher/entropy": "teacher_entropy",
    "student/logprob": "student_logprobs",
    "teacher/logprob": "teacher_logprobs",
}
POLICY_MEANS = {"policy/anchor": "anchor", "policy/clipped_fraction": "clipped", "policy/ratio": "ratio"}


class StepOutput(NamedTuple):
    """Says what a step did; with a `backward`, the gradients are already in the parameters' `.grad`."""

    loss: Tensor  # () what was minimised: detached, or in the graph where the step was given no `backward`
    metrics: dict[str, Tensor]  # () each, detached, not yet copied to the host
    report: Report
    rows: dict[str, Tensor]  # (N,) each, detached, 0 where a row has no weight: per_token, student_entropy, ...


class Term(Protocol):
    """Makes a loss of the log-probabilities of sampled tokens, as `PolicyTerm` does."""

    @property
    def token_weights(self) -> Tensor | None:
        """Says, (N,), which rows have a log-probability: those of a weight other than 0; None: all have."""

    @property
    def temperature(self) -> float:
        """Divides the logits."""

    def scalar(self, rows: Tensor | slice, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss () of these rows' (n,) log-probabilities, in the graph, and row values (n,) to report."""


class Divergence(NamedTuple):
    """Says which divergence is a part of the loss, and of which teacher."""

    loss: FusedLinearDivergence
    weights: Tensor | None  # (N,)
    total: float  # the weighted sum is divided by it
    share: float = 1.0  # and multiplied by this
    old_logprobs: Tensor | None = None  # (N,)
    trust_share: float | None = None  # the share of the second of two teachers
    tilt: TokenTilt | None = None
    scored: TopKLogprobs | None = None  # (N, K): the teacher, where the pass has none


class Sampled(NamedTuple):
    """Holds the log-probabilities of the sampled tokens that have a weight; m of a part's n."""

    local: Tensor | slice  # which of the part's rows
    rows: Tensor | slice  # which of all rows
    logprobs: Tensor  # (m,) in the graph
    entropy: Tensor  # (m,) in the graph


def run_parts(
    model: nn.Module,
    plan: Plan,
    planned: Passes,
    *,
    divergence: Divergence | None = None,
    term: Term | None = None,
    term_share: float = 1.0,
    backward: Backward | None,
) -> tuple[Tensor, RowValues]:
    """Goes backward through all parts; returns the loss (), in the graph without `backward`, and the row values."""
    body, row_values, total = find_body(model), RowValues(plan), torch.zeros((), device=plan.device)
    with closing(planned.parts):
        for part in planned.parts:
            # Anew for each part: under FSDP2 each gathers the head, and its backward frees what it gathered.
            head = head_of(body)
            losses = []
            if divergence is not None:
                weighted = _weighted_sum(part, plan, head, divergence, row_values)
                losses.append(divergence.share * weighted / divergence.total)
            if term is not None:
                sampled = sampled_logprobs(part, plan, head, term.token_weights, temperature=term.temperature)
                loss, values = term.scalar(sampled.rows, sampled.logprobs)
                losses.append(term_share * loss)
                if divergence is None:
                    values |= {"student_logprobs": sampled.logprobs, "student_entropy": sampled.entropy}
                row_values.add(sampled.rows, values)
            whole = sum(losses[1:], start=losses[0])
            if backward is None:  # `passes(whole=True)` has one part
                total = whole
                continue
            total = total + whole.detach()
            with part.no_sync():
                backward(part.attach(whole))
    return total, row_values


def _weighted_sum(part: Part, plan: Plan, head: Head, divergence: Divergence, row_values: RowValues) -> Tensor:
    """Returns the divergence () summed over a part's rows by their weights, in the graph."""
    weights = None if divergence.weights is None else divergence.weights[part.rows]
    if divergence.tilt is None:
        out = _output(part, plan, head, divergence, weights, "sum")
        row_values.add_output(part.rows, out, out.per_token)
        return out.loss
    # The tilt needs each token's own divergence.
    active = None if weights is None else (weights != 0).to(weights.dtype)
    out = _output(part, plan, head, divergence, active, "none")
    options = divergence.loss.options
    sampled = sampled_logprobs(part, plan, head, divergence.weights, temperature=options.temperature)
    tilted = TokenTilt.per_token(
        divergence.tilt.exponents[sampled.rows],
        out.loss[sampled.local],
        sampled.logprobs,
        cast(Tensor, out.teacher_logprobs)[sampled.local],
        alpha=options.alpha,
    )
    tilted = tilted if weights is None else tilted * weights[sampled.local]
    row_values.add_output(part.rows, out, None)
    row_values.add(sampled.rows, {"per_token": tilted})
    return tilted.sum()


def _output(
    part: Part, plan: Plan, head: Head, divergence: Divergence, weights: Tensor | None, reduction: Reduction
) -> DivergenceOutput:
    """Calls the loss on a part's rows, with whichever of the teachers the step has."""
    scored = divergence.scored
    first = None if scored is not None else part.teachers[0]
    teacher: TeacherMix | TopKLogprobs | None = None
    if scored is not None:
        teacher = TopKLogprobs(scored.ids[part.rows], scored.logprobs[part.rows])
    elif divergence.trust_share is not None:
        teacher = TeacherMix(part.teachers[1].states(head), head.weight.detach(), divergence.trust_share)
    return divergence.loss(
        head.states(part.student_hidden),
        head.weight,
        None if first is None else first.states(head),
        None if first is None else first.weight,
        student_head=head.transform,
        teacher_head=None if first is None else first.transform,
        teacher=teacher,
        token_weights=weights,
        target_ids=plan.target_ids[part.rows],
        old_logprobs=None if divergence.old_logprobs is None else divergence.old_logprobs[part.rows],
        reduction=reduction,
    )


def sampled_logprobs(
    part: Part, plan: Plan, head: Head, weights: Tensor | None, *, temperature: float = 1.0
) -> Sampled:
    """Computes the student's log-probabilities of those of a part's rows that have a weight."""
    hidden, targets = part.student_hidden, plan.target_ids[part.rows]
    local: Tensor | slice = slice(None)
    rows = part.rows
    if weights is not None:
        local = weights[part.rows].nonzero()[:, 0]
        rows = part.rows[local] if isinstance(part.rows, Tensor) else local
        hidden, targets = hidden[local], targets[local]
    out = linear_logprobs(head.states(hidden), head.weight, targets, head=head.transform, temperature=temperature)
    return Sampled(local, rows, cast(Tensor, out.logprobs), out.entropy)


class RowValues:
    """Puts row values of the parts back in the plan's order, (N,); 0 where no part has a row with a weight."""

    def __init__(self, plan: Plan) -> None:
        self.device, self.count = plan.device, plan.num_rows
        self.by_name: dict[str, Tensor] = {}
        self.gradient_error: Tensor | None = None  # (2,) the largest of the parts', of hidden states and of head

    def add(self, rows: Tensor | slice, values: Mapping[str, Tensor | None]) -> None:
        for name, value in values.items():
            if value is not None:
                whole = self.by_name.setdefault(name, value.new_zeros(self.count))
                whole[rows] = value.detach()

    def add_output(self, rows: Tensor | slice, out: DivergenceOutput, per_token: Tensor | None) -> None:
        self.add(rows, {name: getattr(out, name) for name in MEANS.values()} | {"per_token": per_token})
        if out.gradient_error is not None:
            known = out.gradient_error if self.gradient_error is None else self.gradient_error
            self.gradient_error = torch.maximum(known, out.gradient_error)

    def metrics(self, weights: Tensor | None, means: Mapping[str, str]) -> dict[str, Tensor]:
        """Averages row values over the rows with a weight (they are 0 elsewhere), and counts these rows."""
        active = torch.tensor(float(self.count), device=self.device)
        if weights is not None:
            active = (weights != 0).sum().float()
        known = {name: self.by_name[row] for name, row in means.items() if row in self.by_name}
        averages = {name: values.sum() / active.clamp(min=1) for name, values in known.items()}
        return averages | {"loss/active_tokens": active}
