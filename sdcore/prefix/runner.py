"""Both passes over a plan: which strategy runs them and why, under whose weights, and that they leave no trace.

    out = run(model, plan(prompts, completions, teacher_prompts))      # the student's own weights are the teacher
    out.student_hidden, out.teacher_hidden                             # (N, H) each, the second without gradient

`passes` is the same for a training step: it gives the rows in parts, one for most strategies, many for `two_phase`,
each of which goes backward before the next one is computed.

What differs from the obvious: whether the teacher may read the student's prompt states is asked of the teacher, once,
here. Dropout is off in both passes, but modules that need training mode for gradient checkpointing keep it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sdkernels import LogitTransform

from ..errors import ArgumentError, UnsupportedModelError
from ..models import Body, Head, find_body, head_of, lifted, without_dropout
from ..teachers import Live, Teacher, TrustRegion
from .checks import Verify
from .choice import STRATEGIES, Strategy, choose, counted_cost, require_fits, teacher_choice
from .planner import Plan, Tree, check_against
from .report import Report
from .strategies import ranks, two_phase


class TeacherRows(NamedTuple):
    """What the loss needs of one teacher, without gradient."""

    hidden: Tensor  # (n, H)
    weight: Tensor | None  # (V, H); None: the student's
    transform: LogitTransform | None  # None: the student's
    lift: Tensor | None = None  # (R, H) where its head has adapters of its own

    def states(self, student: Head) -> Tensor:
        """What goes with the weight; `student` is the head that `weight` None stands for."""
        return student.states(self.hidden).detach() if self.weight is None else lifted(self.hidden, self.lift)


class PrefixOutput(NamedTuple):
    """Result of `run`; rows in the order group, completion, position."""

    student_hidden: Tensor  # (N, H) with gradient: the state that predicts each completion token
    teacher_hidden: Tensor | None  # (N, H) without; None for a plan without teacher
    report: Report


@dataclass(eq=False)
class Part:
    """Some rows of both passes. Make a scalar of them and call backward on `attach(it)` before taking the next part."""

    rows: Tensor | slice  # which of the N rows
    student_hidden: Tensor  # (n, H)
    teachers: tuple[TeacherRows, ...]  # none, one, or two: reference and live teacher of a trust region
    micro: two_phase.MicroBatch | None = field(default=None, repr=False)

    def attach(self, loss: Tensor) -> Tensor:
        return loss if self.micro is None else self.micro.attach(loss)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Around the backward: under `DistributedDataParallel` only the last one of a step synchronises."""
        return nullcontext() if self.micro is None else self.micro.no_sync()


class Passes(NamedTuple):
    """The parts, to be iterated once (close them where they are not taken to the end), and what was chosen."""

    parts: Generator[Part, None, None]
    report: Report


def run(
    model: nn.Module,
    plan: Plan,
    teacher: Teacher | None = None,
    *,
    strategy: Strategy = "auto",
    verify: Verify = "once",
) -> PrefixOutput:
    """Hidden states of the student, with gradient, and of the teacher, for every completion token.

    `teacher` None is `Live()`. `strategy` "auto" chooses and says why in the report; any other is taken as it is, and
    raises `UnsupportedModelError` where the model does not allow it. "two_phase" goes backward as it goes forward and
    is for `passes`. `verify`: "once" compares a strategy with naive when a kind of model first uses it, "always" on
    every plan, "off" never; see `checks`. Raises `PlanError` for ids, lengths or devices that do not fit the model.
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
    verify: Verify = "once",
    whole: bool = False,
) -> Passes:
    """Both passes in parts; `micro_batch` completions at a time asks for `two_phase`. Raises what `run` raises.

    `whole`: all rows in one part, whose graph may go backward at any later time.
    """
    body = find_body(model)
    if whole and (strategy == "two_phase" or micro_batch is not None):
        raise ArgumentError(
            "strategy must not be 'two_phase', nor micro_batch be set, where the states outlive the call: it goes "
            "backward as it goes forward. Use distill_step with a backward"
        )
    if whole and torch.is_grad_enabled() and (reason := _dropout_in_backward(body)):
        raise UnsupportedModelError(reason)
    if strategy not in get_args(Strategy):
        raise ArgumentError(f"strategy must be one of {', '.join(map(repr, get_args(Strategy)))}, got {strategy!r}")
    if verify not in get_args(Verify):
        raise ArgumentError(f"verify must be one of {', '.join(map(repr, get_args(Verify)))}, got {verify!r}")
    if micro_batch is not None and (strategy not in ("auto", "two_phase") or micro_batch < 1):
        raise ArgumentError(f"micro_batch must be positive, for 'two_phase', got {micro_batch} and {strategy!r}")
    check_against(plan, vocab_size=body.vocab_size, max_positions=body.max_positions, device=body.device)
    teachers = _in_turn(Live() if teacher is None else teacher) if plan.teacher else ()
    for one in teachers:
        require_fits(body, one, plan)
    shares = any(one.shares_weights for one in teachers)
    choice, fallbacks = choose(body, plan, strategy, micro_batch, shares, verify, whole)
    taught = [teacher_choice(body, one, plan, choice, verify) for one in teachers]
    report = Report.of(
        plan,
        counted_cost(plan, body, choice.strategy, shares),
        student=choice,
        teacher=taught[0] if taught else None,
        teacher_shares=shares,
        fallbacks=fallbacks,
    )
    return Passes(_parts(body, plan, teachers, choice.strategy, [one.strategy for one in taught], micro_batch), report)


def _in_turn(teacher: Teacher | TrustRegion) -> tuple[Teacher, ...]:
    return (teacher.reference, Live()) if isinstance(teacher, TrustRegion) else (teacher,)


def _dropout_in_backward(body: Body) -> str | None:
    """Why this model's states must not outlive `without_dropout`: layers run once more in backward, with dropout."""
    checkpointed = [m for m in body.base.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in body.model.modules())
    drops |= any(getattr(body.config, name, 0.0) for name in ("attention_dropout", "hidden_dropout", "resid_pdrop"))
    if not (checkpointed and drops):
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
    taught: Sequence[str],  # strategy of each teacher
    micro_batch: int | None,
) -> Generator[Part, None, None]:
    """One part, or in two_phase one per micro-batch; live teachers follow the prompt states that the student leaves."""
    ahead = {
        index: teacher_rows(body, teacher, plan.teacher, taught[index])
        for index, teacher in enumerate(teachers)
        if not teacher.shares_weights
    }
    live = [(index, teacher) for index, teacher in enumerate(teachers) if teacher.shares_weights]
    record: bool | list[int] = [tree.shared for tree in plan.teacher] if live else False
    if strategy != "two_phase":
        with without_dropout(body.model, training=torch.is_grad_enabled()):
            module = STRATEGIES[strategy]
            student_hidden, prompts = ranks.hidden_states(body, module, plan.student, record=record)
            found = ahead | {index: teacher_rows(body, one, plan.teacher, strategy, prompts) for index, one in live}
            # Inside: a checkpointed layer runs once more in backward.
            yield Part(slice(None), student_hidden, tuple(found[index] for index in range(len(teachers))))
        return
    slices, group_rows, group = plan.rows, {}, -1
    with without_dropout(body.model, training=torch.is_grad_enabled()):
        for micro in two_phase.micro_batches(body, plan.student, micro_batch=micro_batch or 1, record=record):
            if live and micro.group != group:
                group, trees = micro.group, plan.teacher[micro.group : micro.group + 1]
                group_rows = {i: teacher_rows(body, one, trees, strategy, micro.prompts) for i, one in live}
            start = slices[micro.group][0].start if micro.group < len(slices) else 0
            found = {i: _take(rows, micro.rows) for i, rows in ahead.items()}
            found |= {i: _take(rows, micro.rows - start) for i, rows in group_rows.items()}
            yield Part(micro.rows, micro.hidden, tuple(found[i] for i in range(len(teachers)) if i in found), micro)


def _take(teacher: TeacherRows, rows: Tensor) -> TeacherRows:
    return teacher._replace(hidden=teacher.hidden[rows])


@torch.no_grad()
def teacher_rows(
    body: Body, teacher: Teacher, trees: Sequence[Tree], strategy: str, prompts: Any = None
) -> TeacherRows:
    """One teacher's states over these trees; `prompts` are those of the student, for a teacher that shares them."""
    if teacher.shares_weights:
        with without_dropout(body.model, training=False):
            hidden, _ = ranks.hidden_states(body, STRATEGIES[strategy], trees, prompts=prompts)
        return TeacherRows(hidden, None, None)
    with teacher.weights(body.model) as module:
        own = find_body(module)
        with without_dropout(own.model, training=False):
            hidden, _ = ranks.hidden_states(own, STRATEGIES[strategy], trees)
        head = head_of(own)
        return TeacherRows(hidden, head.weight.detach(), head.transform, head.lift)
