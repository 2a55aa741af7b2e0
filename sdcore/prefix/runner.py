"""Runs the student's and the teacher's pass over a plan, by the strategy that `choice` names, and leaves no trace.

    out = run(model, plan(prompts, completions, teacher_prompts))      # the student's own weights are the teacher
    out.student_hidden, out.teacher_hidden                             # (N, H) each, the second without gradient

`passes` is the same for a training step: it gives the rows in parts, one for most strategies, many for `two_phase` or
where `max_tokens` bounds what is computed at a time, each of which goes backward before the next one is computed.

What differs from the obvious: whether the teacher may read the student's states is asked of the teacher, once,
here. Dropout is off in both passes, but modules that need training mode for gradient checkpointing keep it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sdkernels import LogitTransform

from ..errors import ArgumentError, UnsupportedModelError
from ..models import Body, Head, find_body, head_of, lifted, without_dropout
from ..models.body import noise_of
from ..teachers import Live, Teacher, TrustRegion
from ..teachers.weights import checked_teacher
from .choice import STRATEGIES, Strategy, choose, choose_for_teacher, counted_cost, require_fits
from .planner import Plan, check_against, filled
from .report import Report
from .strategies import ranks, two_phase
from .tree import Tree, places_of
from .verification import Verify


class TeacherRows(NamedTuple):
    """Holds what the loss needs of one teacher, without gradient."""

    hidden: Tensor  # (n, H)
    weight: Tensor | None  # (V, H); None: the student's
    transform: LogitTransform | None  # None: the student's
    lift: Tensor | None = None  # (R, H) where its head has adapters of its own

    def states(self, student: Head) -> Tensor:
        """Returns what goes with the weight; `student` is the head that `weight` None stands for."""
        return student.states(self.hidden).detach() if self.weight is None else lifted(self.hidden, self.lift)


class PrefixOutput(NamedTuple):
    """Is what `run` returns; rows are in the order group, completion, position."""

    student_hidden: Tensor  # (N, H) with gradient: the state that predicts each completion token
    teacher_hidden: Tensor | None  # (N, H) without; 0 in rows that no view scores; None for a plan without teacher
    report: Report


@dataclass(eq=False)
class Part:
    """Holds some rows of both passes, of which the caller makes a scalar.

    Call backward on `attach(scalar)` before taking the next part.
    """

    rows: Tensor | slice  # which of the N rows
    student_hidden: Tensor  # (n, H)
    teachers: tuple[TeacherRows, ...]  # none, one, or two: reference and live teacher of a trust region
    micro: two_phase.MicroBatch | None = field(default=None, repr=False)

    def attach(self, loss: Tensor) -> Tensor:
        return loss if self.micro is None else self.micro.attach(loss)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Goes around the backward: under `DistributedDataParallel` only the last one of a step synchronises."""
        return nullcontext() if self.micro is None else self.micro.no_sync()


class Passes(NamedTuple):
    """Holds the parts, to be iterated once, and what was chosen."""

    parts: Generator[Part, None, None]  # close it where it is not taken to the end
    report: Report


def run(
    model: nn.Module,
    plan: Plan,
    teacher: Teacher | None = None,
    *,
    strategy: Strategy = "auto",
    verify: Verify = "once",
) -> PrefixOutput:
    """Returns the hidden states of the student, with gradient, and of the teacher, for every completion token.

    `teacher` None is `Live()`. `strategy` "auto" chooses and says why in the report; any other is taken as it is, and
    raises `UnsupportedModelError` where the model does not allow it. "two_phase" goes backward as it goes forward and
    is for `passes`. `verify`: "once" compares a strategy with naive when a kind of model first uses it, "always" on
    every plan, "off" never; see `verification`. Raises `PlanError` for ids, lengths or devices that do not fit the
    model.
    """
    if isinstance(teacher, TrustRegion):
        raise ArgumentError("teacher must be one set of weights, got TrustRegion: run both, or use distill_step")
    parts, report = passes(model, plan, teacher=teacher, strategy=strategy, verify=verify, whole=True)
    (part,) = parts
    return PrefixOutput(part.student_hidden, part.teachers[0].hidden if part.teachers else None, report)


def passes(
    model: nn.Module,
    plan: Plan,
    *,
    teacher: Teacher | TrustRegion | None = None,
    strategy: Strategy = "auto",
    micro_batch: int | None = None,
    max_tokens: int | None = None,
    verify: Verify = "once",
    whole: bool = False,
    vocab_size: int | None = None,
) -> Passes:
    """Prepares both passes in parts; `micro_batch` completions at a time asks for `two_phase`. Raises as `run` does.

    `max_tokens`: whole trees of several groups are run together as long as neither pass computes more tokens at a time;
    a tree of more is run alone. `whole`: all rows in one part, whose graph may go backward at any later time.
    `vocab_size`: as in `require_fits`.
    """
    body = find_body(model)
    if whole and (strategy == "two_phase" or micro_batch is not None or max_tokens is not None):
        raise ArgumentError(
            "strategy must not be 'two_phase', nor micro_batch or max_tokens be set, where the states outlive the "
            "call: they go backward as they go forward. Use distill_step with a backward"
        )
    if whole and torch.is_grad_enabled() and (reason := _dropout_in_backward(body)):
        raise UnsupportedModelError(reason)
    if strategy not in get_args(Strategy):
        raise ArgumentError(f"strategy must be one of {', '.join(map(repr, get_args(Strategy)))}, got {strategy!r}")
    if verify not in get_args(Verify):
        raise ArgumentError(f"verify must be one of {', '.join(map(repr, get_args(Verify)))}, got {verify!r}")
    if micro_batch is not None and (strategy not in ("auto", "two_phase") or micro_batch < 1):
        raise ArgumentError(f"micro_batch must be positive, for 'two_phase', got {micro_batch} and {strategy!r}")
    if max_tokens is not None:
        if max_tokens < 1 or strategy == "two_phase" or micro_batch is not None:
            raise ArgumentError(
                f"max_tokens must be positive, without micro_batch and 'two_phase', got {max_tokens}, {micro_batch} "
                f"and {strategy!r}"
            )
        if (reason := two_phase.takes_one_backward(body)) is not None:
            raise UnsupportedModelError(reason)
    check_against(plan, vocab_size=body.vocab_size, max_positions=body.max_positions, device=body.device)
    teachers: tuple[Teacher, ...] = ()
    if plan.teachers:
        own = Live() if teacher is None else teacher
        teachers = (own.reference, Live()) if isinstance(own, TrustRegion) else (own,)
        if len(plan.teachers) not in (1, len(teachers)):
            raise ArgumentError(f"plan must have views of one teacher or {len(teachers)}, got {len(plan.teachers)}")
        if len(plan.teachers) < len(teachers):
            plan = replace(plan, teachers=plan.teachers * len(teachers))
    of_each = [replace(plan, teachers=(trees,)) for trees in plan.teachers]
    for weights, own_plan in zip(teachers, of_each, strict=True):
        checked_teacher("teacher", weights)
        require_fits(body, weights, own_plan, vocab_size)
    shares = any(weights.shares_weights for weights in teachers)
    choice, fallbacks = choose(body, plan, strategy, micro_batch, shares, verify, whole or max_tokens is not None)
    choices = [
        choose_for_teacher(body, weights, own_plan, choice, verify)
        for weights, own_plan in zip(teachers, of_each, strict=True)
    ]
    report = Report.of(
        plan,
        counted_cost(plan, body, choice.strategy, shares),
        student=choice,
        teachers=choices,
        teacher_shares=shares,
        fallbacks=fallbacks,
    )
    strategies = [of_teacher.strategy for of_teacher in choices]
    rows = [list(range(len(plan.student)))]
    if max_tokens is not None:
        by_side = [
            [tree.naive_tokens() if name == "naive" else tree.tokens(read_shared=reads) for tree in trees]
            for name, (trees, reads) in zip(
                [choice.strategy, *strategies], plan.sides(teacher_shares=shares), strict=True
            )
        ]
        rows = filled(list(zip(*by_side, strict=True)), max_tokens)
        # Under FSDP2 all ranks run the model equally often.
        rows += [[]] * (ranks.runs_of_all(body, [len(rows)])[0] - len(rows))
    return Passes(_parts(body, plan, teachers, choice.strategy, strategies, micro_batch, rows), report)


def _dropout_in_backward(body: Body) -> str | None:
    """Says why this model's states must not outlive `without_dropout`: a layer would run again, with dropout."""
    checkpointed = [m for m in body.base.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    if not (checkpointed and noise_of(body.model, body.config)):
        return None
    return (
        f"{body.name} has dropout, and checkpoints its layers, which would run again in backward with dropout on: "
        "use distill_step, or set dropout to 0"
    )


def _parts(
    body: Body,
    plan: Plan,
    teachers: Sequence[Teacher],
    strategy: str,
    teachers_strategies: Sequence[str],
    micro_batch: int | None,
    rows: Sequence[Sequence[int]],
) -> Generator[Part, None, None]:
    """Gives one part for each of the rows, lists of groups, or in two_phase one per micro-batch.

    A teacher with weights of its own runs ahead of all parts. A live one, of which there is at most one, the last, runs
    after the student, whose prompt states it reads.
    """
    places = torch.arange(plan.num_rows)
    ahead = [
        _among(places, trees, teacher_rows(body, teacher, trees, of_teacher, rows=rows))
        for teacher, trees, of_teacher in zip(teachers, plan.teachers, teachers_strategies, strict=True)
        if not teacher.shares_weights
    ]
    live = list(zip(teachers, plan.teachers, strict=True))[len(ahead) :]
    record: Any = [tree.reads for _, trees in live for tree in trees] if live else False
    whole = strategy != "two_phase" and len(rows) == 1
    # Around the parts: a checkpointed layer runs once more in backward.
    with without_dropout(body.model, training=torch.is_grad_enabled()):
        if strategy == "two_phase":
            batches = two_phase.micro_batches(body, plan.student, micro_batch=micro_batch or 1, record=record)
        else:
            batches = two_phase.row_by_row(body, STRATEGIES[strategy], plan.student, rows, record=record)
        group, after = -1, list[TeacherRows]()
        for micro in batches:
            if micro.group != group:
                group = micro.group
                groups = [g for g in ([group] if strategy == "two_phase" else rows[group]) if g < len(plan.student)]
                places = places_of([plan.student[g] for g in groups]).sort().values
                after = []
                for teacher, trees in live:
                    own = [trees[g] for g in groups]
                    after.append(_among(places, own, teacher_rows(body, teacher, own, strategy, micro.prompts)))
            if whole:
                yield Part(slice(None), micro.hidden, (*ahead, *after))
                continue
            among = torch.searchsorted(places.to(micro.rows.device), micro.rows)
            taken = [of_all._replace(hidden=of_all.hidden[micro.rows]) for of_all in ahead]
            taken += [of_group._replace(hidden=of_group.hidden[among]) for of_group in after]
            yield Part(micro.rows, micro.hidden, tuple(taken), micro)


def _among(places: Tensor, trees: Sequence[Tree], rows: TeacherRows) -> TeacherRows:
    """Puts a teacher's rows where they belong among these of the plan's, (n,) ascending; 0 where it has none."""
    own = places_of(trees).sort().values
    if len(own) == len(places):
        return rows
    whole = rows.hidden.new_zeros(len(places), rows.hidden.shape[1])
    return rows._replace(hidden=whole.index_copy(0, torch.searchsorted(places, own).to(whole.device), rows.hidden))


@torch.no_grad()
def teacher_rows(
    body: Body,
    teacher: Teacher,
    trees: Sequence[Tree],
    strategy: str,
    prompts: Any = None,
    *,
    rows: Sequence[Sequence[int]] | None = None,
) -> TeacherRows:
    """Runs one teacher over these trees; `prompts` are the student's states, for a teacher of its weights.

    One of other weights runs the trees of one of `rows` after the other; None: all at once.
    """
    if teacher.shares_weights:
        with without_dropout(body.model, training=False):
            hidden, _ = ranks.hidden_states(body, STRATEGIES[strategy], trees, prompts=prompts)
        return TeacherRows(hidden, None, None)
    with teacher.weights(body.model) as module:
        own = find_body(module)
        with without_dropout(own.model, training=False):
            of_rows = [trees] if rows is None else [[trees[g] for g in row] for row in rows]
            hidden = torch.cat([ranks.hidden_states(own, STRATEGIES[strategy], row)[0] for row in of_rows])
            if len(of_rows) > 1:
                order = torch.cat([places_of(row).sort().values for row in of_rows]).argsort()
                hidden = hidden[order.to(hidden.device)]
        head = head_of(own)
        return TeacherRows(hidden, head.weight.detach(), head.transform, head.lift)
