"""Both passes over a plan: which strategy runs them and why, under whose weights, and that they leave no trace.

    out = run(model, plan(prompts, completions, teacher_prompts))      # the student's own weights are the teacher
    out.student_hidden, out.teacher_hidden                             # (N, H) each, the second without gradient

`passes` is the same for a training step: it gives the rows in parts, one for most strategies, many for `two_phase`,
each of which goes backward before the next one is computed.

What differs from the obvious: whether the teacher may read the student's prompt states is asked of the teacher, once,
here. Dropout is off in both passes, but modules that need training mode for gradient checkpointing keep it.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sdkernels import LogitTransform

from ..errors import ArgumentError, UnsupportedModelError
from ..heads import Head, lifted
from ..models import Body, find_body, head_of, without_dropout
from ..teachers import Live, Snapshot, Teacher, TrustRegion
from . import cached, naive, packed, ranks, two_phase
from .caches import require_readable
from .checks import Verify, agrees
from .costs import Cost, cost
from .planner import Plan, Tree, check_against
from .report import Choice, Fallback, Report

Strategy = Literal["auto", "packed", "cached", "two_phase", "naive"]
STRATEGIES = {"packed": packed, "cached": cached, "two_phase": two_phase, "naive": naive}
# Sharing that saves less than this share of the tokens is not worth another code path.
LEAST_SAVING = 0.05
# What all completions at once may keep for backward, of the memory that is free.
MOST_OF_FREE = 0.7


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
        _require_fits(body, one, plan)
    shares = any(one.shares_weights for one in teachers)
    choice, fallbacks = _choose(body, plan, strategy, micro_batch, shares, verify, whole)
    taught = [_teacher_choice(body, one, plan, choice, verify) for one in teachers]
    report = Report.of(
        plan,
        _cost(plan, body, choice.strategy, shares),
        student=choice,
        teacher=taught[0] if taught else None,
        teacher_shares=shares,
        fallbacks=fallbacks,
    )
    return Passes(_parts(body, plan, teachers, choice.strategy, [one.strategy for one in taught], micro_batch), report)


def _in_turn(teacher: Teacher | TrustRegion) -> tuple[Teacher, ...]:
    return (teacher.reference, Live()) if isinstance(teacher, TrustRegion) else (teacher,)


def _require_fits(body: Body, teacher: Teacher, plan: Plan) -> None:
    """Refuse a teacher with a model of its own that cannot read the plan, or has another vocabulary."""
    if teacher.shares_weights or isinstance(teacher, Snapshot):
        return
    with teacher.weights(body.model) as module:
        own = find_body(module)
        if own.causal_lm is body.causal_lm:
            return
        # The completions are among what the student reads, but its prompts are not the teacher's to read.
        check_against(plan, vocab_size=own.vocab_size, max_positions=None, device=own.device)
        read = replace(plan, student=())
        check_against(read, vocab_size=own.vocab_size, max_positions=own.max_positions, device=own.device)
        if body.num_logits != own.num_logits:
            raise ArgumentError(
                f"teacher must have the student's vocabulary, {body.num_logits} logits a token, got {own.num_logits}"
            )


def _teacher_choice(body: Body, teacher: Teacher, plan: Plan, choice: Choice, verify: Verify) -> Choice:
    """The student's strategy, if it is right for the teacher's model too."""
    # A snapshot is the student's own module with other values, which may have to be moved in from elsewhere.
    if teacher.shares_weights or isinstance(teacher, Snapshot) or choice.strategy == "naive":
        return choice
    with teacher.weights(body.model) as module:
        own = find_body(module)
        reason = _doubt(own, plan.teacher, choice.strategy, plan, verify)
        if reason is None:
            return choice
        _warn_once(own, reason)
        return _choice(own, replace(plan, student=()), "naive", reason)


def _choose(
    body: Body, plan: Plan, strategy: Strategy, micro_batch: int | None, shares: bool, verify: Verify, whole: bool
) -> tuple[Choice, list[Fallback]]:
    """The strategy, with its reason, and what was not taken although it was wanted."""
    if strategy != "auto":
        reason = _obstacle(body, [*plan.student, *plan.teacher], strategy)
        if reason is not None:
            raise UnsupportedModelError(reason)
        if strategy != "naive" and verify != "off" and (problem := agrees(body, STRATEGIES[strategy], plan, verify)):
            raise UnsupportedModelError(f"strategy {strategy!r} disagrees with naive: {problem}")
        return _choice(body, plan, strategy, "asked for"), []
    shortage = "" if whole or micro_batch is not None or body.one_backward else _shortage(body, plan, shares)
    # All ranks choose alike: what is worth it on one of them, or does not fit, decides.
    saving, short = ranks.most(body, _saving(plan, shares), shortage != "")
    if saving < LEAST_SAVING and micro_batch is None:
        return _choice(body, plan, "naive", f"sharing would save {saving:.0%} of the tokens"), []
    if micro_batch is not None:
        wanted = {"two_phase": f"micro_batch={micro_batch} bounds the memory"}
    elif short:
        wanted = {"two_phase": shortage or "on another rank all completions at once would not fit the memory"}
    else:
        wanted = {"packed": "no token twice and no padding", "cached": "no token twice"}
    fallbacks: list[Fallback] = []
    for name, why in wanted.items():
        reason = _doubt(body, [*plan.student, *plan.teacher], name, plan, verify)
        if reason is None:
            return _choice(body, plan, name, why), fallbacks
        fallbacks.append(Fallback(name, reason))
    _warn_once(body, fallbacks[-1].reason)
    return _choice(body, plan, "naive", "nothing else works for this model"), fallbacks


def _doubt(body: Body, trees: Sequence[Tree], strategy: str, plan: Plan, verify: Verify) -> str | None:
    """Why this strategy cannot run this model, or does so wrongly; None if all is well."""
    reason = _obstacle(body, trees, strategy)
    if ranks.most(body, reason is not None)[0]:
        return reason or f"the plan of another rank does not allow {strategy}"
    if verify == "off":
        return None
    try:
        return agrees(body, STRATEGIES[strategy], plan, verify)
    except UnsupportedModelError as error:  # what only running it shows
        return str(error)


def _obstacle(body: Body, trees: Sequence[Tree], strategy: str) -> str | None:
    """Why this strategy cannot run this model; None if it can."""
    if strategy == "packed":
        return packed.supports(body)
    if strategy == "two_phase" and body.one_backward:
        return "DeepSpeed takes one backward per step, and two_phase goes backward for each part of it"
    if strategy in ("cached", "two_phase"):
        try:
            with body.keeping_caches():
                require_readable(body, trees)
        except UnsupportedModelError as error:
            return str(error)
    return None


_WARNED: set[tuple[str, str]] = set()


def _warn_once(body: Body, reason: str) -> None:
    if (body.name, reason) not in _WARNED:
        _WARNED.add((body.name, reason))
        warnings.warn(f"{body.name} is run without sharing prefixes (strategy naive): {reason}", stacklevel=2)


def _saving(plan: Plan, shares: bool) -> float:
    """The share of a naive run's tokens that need not be computed."""
    naive_tokens = sum(tree.naive_tokens() for tree in (*plan.student, *plan.teacher))
    tokens = sum(tree.tokens(read_shared=False) for tree in plan.student)
    tokens += sum(tree.tokens(read_shared=shares) for tree in plan.teacher)
    return 1 - tokens / naive_tokens if naive_tokens else 0.0


def _shortage(body: Body, plan: Plan, shares: bool) -> str:
    """Why all completions at once would not fit the free memory; "" where they would, as far as is known."""
    counted = _cost(plan, body, "packed", shares) if torch.is_grad_enabled() else None
    if counted is None:
        return ""
    free, kept = _free_bytes(body.device), counted.student.kept_bytes
    if free is None or kept <= MOST_OF_FREE * free:
        return ""
    return f"all completions at once would keep {kept / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _free_bytes(device: torch.device) -> int | None:
    """What can still be allocated there; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    # Not the memory that is free: most of what files take up is given back when it is asked for.
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


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


def _choice(body: Body, plan: Plan, strategy: str, reason: str) -> Choice:
    """With the share of the batches' tokens that are padding."""
    padded = filled = 0
    for tree in (*plan.student, *plan.teacher) if strategy != "packed" else ():
        if strategy == "naive":
            batches = naive.length_buckets(body, lengths := [len(tree.sequence(i)) for i in tree.active])
        else:
            batches, lengths = cached.branch_batches(body, tree), [len(branch) for branch in tree.branches]
            padded, filled = padded + len(tree.trunk), filled + len(tree.trunk)
        for batch in batches:
            padded += len(batch) * max((lengths[i] for i in batch), default=0)
            filled += sum(lengths[i] for i in batch)
    return Choice(strategy, reason, 1 - filled / padded if padded else 0.0)


def _cost(plan: Plan, body: Body, strategy: str, shares: bool) -> Cost | None:
    try:
        return cost(plan, body.config, strategy=strategy, teacher_shares=shares, dtype_bytes=body.dtype.itemsize)
    except UnsupportedModelError:
        return None


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


__all__ = ["Part", "Passes", "PrefixOutput", "Strategy", "TeacherRows", "passes", "run"]
