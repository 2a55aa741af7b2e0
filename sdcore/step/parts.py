"""What the steps have in common: the loop over the parts of a pass, what a step returns, and checks of arguments.

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

from ..losses import FusedLinearDivergence
from ..losses.tilt import TokenTilt
from ..models import Head, find_body, head_of
from ..prefix.planner import Plan
from ..prefix.report import Report
from ..prefix.runner import Part, Passes

Backward = Callable[[Tensor], object]
MEANS = {
    "student/entropy": "student_entropy",
    "teacher/entropy": "teacher_entropy",
    "student/logprob": "student_logprobs",
    "teacher/logprob": "teacher_logprobs",
}


class StepOutput(NamedTuple):
    """What a step reports; with a `backward`, the gradients are already in the parameters' `.grad`."""

    loss: Tensor  # () what was minimised: detached, or in the graph where the step was given no `backward`
    metrics: dict[str, Tensor]  # () each, detached, not yet copied to the host
    report: Report
    rows: dict[str, Tensor]  # (N,) each, detached, 0 where a row has no weight: per_token, student_entropy, ...


class Term(Protocol):
    """A loss of the log-probabilities of sampled tokens, such as `PolicyTerm`."""

    @property
    def token_weights(self) -> Tensor | None:
        """(N,): rows of weight 0 have no log-probability. None: all have."""

    @property
    def temperature(self) -> float:
        """Divides the logits."""

    def scalar(self, rows: Tensor | slice, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of (n,) log-probabilities of these rows the loss (), in the graph, and row values (n,) for the output."""


class Divergence(NamedTuple):
    """The other part of a step's loss."""

    loss: FusedLinearDivergence
    weights: Tensor | None  # (N,)
    total: float  # the weighted sum is divided by it
    share: float = 1.0  # and multiplied by it
    old_logprobs: Tensor | None = None  # (N,)
    trust_share: float | None = None  # the share of the second of two teachers
    tilt: TokenTilt | None = None
    scored: TopKLogprobs | None = None  # (N, K): the teacher, where the pass has none


class Sampled(NamedTuple):
    """Log-probabilities of the sampled tokens that have a weight; m of a part's n."""

    local: Tensor | slice  # which of the part's rows
    rows: Tensor | slice  # which of all rows
    logprobs: Tensor  # (m,) in the graph
    entropy: Tensor  # (m,) in the graph


def run_parts(
    model: nn.Module,
    plan: Plan,
    passed: Passes,
    *,
    divergence: Divergence | None = None,
    term: Term | None = None,
    term_share: float = 1.0,
    backward: Backward | None,
) -> tuple[Tensor, Seen]:
    """Loss and gradients of all parts: the loss () detached, or in the graph without `backward`, and the row values."""
    body, seen, total = find_body(model), Seen(plan), torch.zeros((), device=plan.device)
    with closing(passed.parts):
        for part in passed.parts:
            # Anew for each part: under FSDP2 each gathers the head, and its backward frees what it gathered.
            head = head_of(body)
            losses = []
            if divergence is not None:
                losses.append(divergence.share * _divergence(part, plan, head, divergence, seen) / divergence.total)
            if term is not None:
                sampled = sampled_logprobs(part, plan, head, term.token_weights, temperature=term.temperature)
                loss, values = term.scalar(sampled.rows, sampled.logprobs)
                losses.append(term_share * loss)
                if divergence is None:
                    values |= {"student_logprobs": sampled.logprobs, "student_entropy": sampled.entropy}
                seen.add(sampled.rows, values)
            whole = sum(losses[1:], start=losses[0])
            if backward is None:  # `passes(whole=True)` has one part
                total = whole
                continue
            total = total + whole.detach()
            with part.no_sync():
                backward(part.attach(whole))
    return total, seen


def _divergence(part: Part, plan: Plan, head: Head, what: Divergence, seen: Seen) -> Tensor:
    """() the weighted sum over a part's rows, in the graph."""
    weights = None if what.weights is None else what.weights[part.rows]
    if what.tilt is None:
        out = _divergence_output(part, plan, head, what, weights, "sum")
        seen.add_output(part.rows, out, out.per_token)
        return out.loss
    # The tilt needs each token's own divergence.
    active = None if weights is None else (weights != 0).to(weights.dtype)
    out = _divergence_output(part, plan, head, what, active, "none")
    temperature = float(what.loss.options["temperature"])  # type: ignore[arg-type]
    local, rows, logprobs, _ = sampled_logprobs(part, plan, head, what.weights, temperature=temperature)
    tilted = TokenTilt.per_token(
        what.tilt.exponents[rows],
        out.loss[local],
        logprobs,
        cast(Tensor, out.teacher_logprobs)[local],
        alpha=float(what.loss.options["alpha"]),  # type: ignore[arg-type]
    )
    tilted = tilted if weights is None else tilted * weights[local]
    seen.add_output(part.rows, out, None)
    seen.add(rows, {"per_token": tilted})
    return tilted.sum()


def _divergence_output(
    part: Part, plan: Plan, head: Head, what: Divergence, weights: Tensor | None, reduction: Reduction
) -> DivergenceOutput:
    first = None if what.scored is not None else part.teachers[0]
    teacher: TeacherMix | TopKLogprobs | None = None
    if what.scored is not None:
        teacher = TopKLogprobs(what.scored.ids[part.rows], what.scored.logprobs[part.rows])
    elif what.trust_share is not None:
        teacher = TeacherMix(part.teachers[1].states(head), head.weight.detach(), what.trust_share)
    return what.loss(
        head.states(part.student_hidden),
        head.weight,
        None if first is None else first.states(head),
        None if first is None else first.weight,
        student_head=head.transform,
        teacher_head=None if first is None else first.transform,
        teacher=teacher,
        token_weights=weights,
        target_ids=plan.target_ids[part.rows],
        old_logprobs=None if what.old_logprobs is None else what.old_logprobs[part.rows],
        reduction=reduction,
    )


def sampled_logprobs(
    part: Part, plan: Plan, head: Head, weights: Tensor | None, *, temperature: float = 1.0
) -> Sampled:
    """Of a part's rows with a weight, from the student's states."""
    hidden, targets = part.student_hidden, plan.target_ids[part.rows]
    local: Tensor | slice = slice(None)
    rows = part.rows
    if weights is not None:
        local = weights[part.rows].nonzero()[:, 0]
        rows = part.rows[local] if isinstance(part.rows, Tensor) else local
        hidden, targets = hidden[local], targets[local]
    found = linear_logprobs(head.states(hidden), head.weight, targets, head=head.transform, temperature=temperature)
    return Sampled(local, rows, cast(Tensor, found.logprobs), found.entropy)


class Seen:
    """Row values (N,) of the parts, put back in the plan's order; 0 where no part has a row with a weight."""

    def __init__(self, plan: Plan) -> None:
        self.device, self.count = plan.device, plan.num_rows
        self.values: dict[str, Tensor] = {}

    def add(self, rows: Tensor | slice, values: Mapping[str, Tensor | None]) -> None:
        for name, value in values.items():
            if value is not None:
                whole = self.values.setdefault(name, value.new_zeros(self.count))
                whole[rows] = value.detach()

    def add_output(self, rows: Tensor | slice, out: DivergenceOutput, per_token: Tensor | None) -> None:
        self.add(rows, {name: getattr(out, name) for name in MEANS.values()} | {"per_token": per_token})

    def metrics(self, weights: Tensor | None, means: Mapping[str, str]) -> dict[str, Tensor]:
        """Metric → mean of a row value over the rows with a weight (it is 0 elsewhere), and how many those are."""
        active = torch.tensor(float(self.count), device=self.device)
        if weights is not None:
            active = (weights != 0).sum().float()
        found = {
            name: self.values[row].sum() / active.clamp(min=1) for name, row in means.items() if row in self.values
        }
        return found | {"loss/active_tokens": active}
