"""Probes a model by a pass over a few completions: top-k overlap, drift from a base model, leak probe.

None of them makes logits (n, V): what they compare comes from hidden states by `linear_topk` and `linear_divergence`.

The leak probe asks what the privileged context teaches. The teacher reads the same completions once with the context of
their own prompt and once with that of another prompt:

- the wrong context teaches little (`teacher/leak_ratio` near 0): what is learned is in the context;
- it teaches as much and says the same (ratio near 1, `teacher/content_kl` near 0): the method teaches style, or that
  there is a context;
- it teaches as much and says something else (ratio near 1, content KL large): the teacher believes what it reads, so
  the context had better be right.

What differs from the obvious: a context is not shuffled as text. The builder conditions the other prompt's group, its
example's columns and its completions included, on this prompt, so that whatever a method takes its context from is
exchanged. Where that gives the very same prompt, as with one system prompt for all, there is nothing to compare.

Each function runs the model the same number of times whatever it finds, so that ranks which call it together do not
wait for each other. Not covered: the live half of a trust region, whose reference is probed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from sdkernels import DivergenceOutput, LogitTransform, linear_divergence, linear_topk
from sdkernels.types import in_float64

from ..contexts import ContextBuilder
from ..errors import ArgumentError, SdcoreError, require_positive
from ..models import Body, Head, find_body, head_of
from ..models.heads import logits_at
from ..prefix import Plan, TeacherRows, passes
from ..prefix import plan as plan_of
from ..prefix.choice import Strategy
from ..teachers import Teacher, TrustRegion
from ..types import Conditioned, Group
from .measures import check_one_per_group


class _Chosen(NamedTuple):
    """Holds a completion that a probe looks at."""

    group: Group
    ids: Tensor  # (R,)
    prompts: tuple[Tensor, ...]  # the teacher's, one for each pass
    counts: bool  # False: run, so that every rank runs something, but not averaged


class _Rows(NamedTuple):
    """Holds both sides' states of all rows, and their heads."""

    plan: Plan
    student: Tensor  # (N, H)
    student_head: Head
    teacher: Tensor  # (N, Ht)
    teacher_head: Head


@torch.no_grad()
def topk_overlap(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    k: int = 20,
    of: Literal["student", "teacher"] = "student",
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Measures how much of both distributions a top-k support holds, and how far the two top-k sets agree, each row.

    Equal to this, with `log_p`, `log_q` (n, V) and `of="student"`::

        support = log_p.topk(k).indices
        log_p.gather(1, support).exp().sum(-1), log_q.gather(1, support).exp().sum(-1)      # student_mass, teacher_mass
        torch.isin(support[i], log_q[i].topk(k).indices).mean()                             # overlap_ratio of row i

    Hidden states (n, H) and (n, Ht), without gradient; k is at most V. The names are verl's, after "Rethinking
    On-Policy Distillation" (arXiv:2604.13016). Raises as `sdkernels.linear_topk` does.
    """
    k = min(k, student_head.weight.shape[0])
    sides = ((student_hidden, student_head), (teacher_hidden, teacher_head))
    tops = [linear_topk(hidden, head.weight, k, head=head.transform, temperature=temperature) for hidden, head in sides]
    own = 0 if of == "student" else 1
    support, other = tops[own], tops[1 - own]
    hidden, head = sides[1 - own]
    # The normaliser of the other side is known from its likeliest token: its logit minus its log-probability.
    logits = logits_at(hidden, head, torch.cat([other.ids[:, :1], support.ids], 1), temperature)
    log_z = logits[:, :1] - other.logprobs[:, :1]
    masses = [support.logprobs.exp().sum(-1), (logits[:, 1:] - log_z).exp().sum(-1).clamp(max=1.0)]
    shared = (support.ids[:, :, None] == other.ids[:, None, :]).any(-1).float().mean(-1)
    return {
        "distillation/student_mass": masses[own],
        "distillation/teacher_mass": masses[1 - own],
        "distillation/overlap_ratio": shared,
    }


@torch.no_grad()
def overlap(
    model: nn.Module,
    groups: Sequence[Group],
    conditioned: Sequence[Conditioned],
    *,
    teacher: Teacher | TrustRegion | None = None,
    k: int = 20,
    of: Literal["student", "teacher"] = "student",
    temperature: float = 1.0,
    max_completions: int = 4,
    max_rows: int = 256,
    strategy: Strategy = "auto",
) -> dict[str, float]:
    """Averages `topk_overlap` of student and teacher over at most `max_rows` tokens of a few active completions.

    {} where no completion is active. Raises `ArgumentError` and what `sdcore.prefix.passes` raises.
    """
    require_positive(k=k, max_completions=max_completions, max_rows=max_rows)
    check_one_per_group(groups, conditioned)
    chosen = []
    for g, i in _few(groups, [seen.active for seen in conditioned], max_completions):
        rollout, prompt = groups[g].rollouts[i], conditioned[g].teacher_prompts[i]
        chosen.append(_Chosen(groups[g], rollout.completion_ids, (prompt,), conditioned[g].active[i]))
    rows = _run(model, chosen, teacher, strategy)
    picked = _counted(rows.plan, chosen)
    if not len(picked):
        return {}
    picked = picked[torch.linspace(0, len(picked) - 1, min(max_rows, len(picked))).round().long()].to(rows.plan.device)
    values = topk_overlap(
        rows.student[picked], rows.student_head, rows.teacher[picked], rows.teacher_head, k=k, of=of,
        temperature=temperature,
    )  # fmt: skip
    return {name: float(in_float64(value).mean()) for name, value in values.items()}


@torch.no_grad()
def drift(
    model: nn.Module,
    groups: Sequence[Group],
    reference: Teacher,
    *,
    temperature: float = 1.0,
    max_completions: int = 8,
    strategy: Strategy = "auto",
) -> dict[str, float]:
    """Measures how far the student has moved from `reference`, on its own completions of its own prompts.

    `reference` is `Frozen(base model)` or `AdapterOff()`. The KL is over the full vocabulary, student to reference,
    mean over the tokens of a few completions. {} where all are empty. Raises `ArgumentError` for a reference that is
    the student itself, and what `sdcore.prefix.passes` raises.
    """
    require_positive(max_completions=max_completions)
    if isinstance(reference, TrustRegion) or reference.shares_weights:
        raise ArgumentError(
            f"reference must have other weights than the student, such as Frozen(base), got {type(reference).__name__}"
        )
    everyone = [[True] * len(group.rollouts) for group in groups]
    chosen = [
        _Chosen(groups[g], groups[g].rollouts[i].completion_ids, (groups[g].prompt_ids,), True)
        for g, i in _few(groups, everyone, max_completions)
    ]
    rows = _run(model, chosen, reference, strategy)
    if not rows.plan.num_rows:
        return {}
    student, teacher = (rows.student, rows.student_head), (rows.teacher, rows.teacher_head)
    out = _divergence(student, teacher, temperature=temperature, target_ids=rows.plan.target_ids)
    gap = cast(Tensor, out.student_logprobs) - cast(Tensor, out.teacher_logprobs)
    return {"student/drift_kl": float(out.loss), "student/drift_logprob_gap": float(in_float64(gap).mean())}


@torch.no_grad()
def leak(
    model: nn.Module,
    groups: Sequence[Group],
    builder: ContextBuilder,
    tokenizer: Any,
    *,
    teacher: Teacher | TrustRegion | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    max_completions: int = 8,
    strategy: Strategy = "auto",
) -> dict[str, float]:
    """Measures what another prompt's context teaches, against what the right one does: see above.

    `alpha` is the divergence's, as in `linear_divergence`; the KL between the two teachers is always right to wrong.
    {} where there is nothing to compare: one group, one context for all, no active completion. Raises what the builder
    raises for the right context, and what `sdcore.prefix.passes` raises.
    """
    require_positive(max_completions=max_completions)
    right = [builder.condition(group, tokenizer) for group in groups]
    positions = find_body(model).max_positions
    wrong = [_of_another(groups, g, builder, tokenizer, positions) for g in range(len(groups))]
    comparable = [
        [
            is_active and others is not None and not torch.equal(prompt, others[i % len(others)])
            for i, (is_active, prompt) in enumerate(zip(seen.active, seen.teacher_prompts, strict=True))
        ]
        for seen, others in zip(right, wrong, strict=True)
    ]
    chosen = []
    for g, i in _few(groups, comparable, max_completions):
        others, own = wrong[g], right[g].teacher_prompts[i]
        prompts = (own, own if others is None else others[i % len(others)])
        chosen.append(_Chosen(groups[g], groups[g].rollouts[i].completion_ids, prompts, comparable[g][i]))
    rows = _run(model, chosen, teacher, strategy)
    picked = _counted(rows.plan, chosen).to(rows.plan.device)
    if not len(picked):
        return {}
    # The passes see every completion twice: first all with the right context, then all with another's.
    half = rows.plan.num_rows // 2
    student = (rows.student[picked], rows.student_head)
    taught, misled = ((rows.teacher[at], rows.teacher_head) for at in (picked, picked + half))
    context, leaked, content = (
        float(_divergence(first, second, alpha=of, temperature=temperature).loss)
        for first, second, of in ((student, taught, alpha), (student, misled, alpha), (taught, misled, 1.0))
    )
    values = {"teacher/context_kl": context, "teacher/leak_kl": leaked, "teacher/content_kl": content}
    # There is no ratio of two contexts that teach nothing.
    return values | ({"teacher/leak_ratio": leaked / context} if context > 1e-9 else {})


def _divergence(
    first: tuple[Tensor, Head],
    second: tuple[Tensor, Head],
    *,
    temperature: float,
    alpha: float = 1.0,
    target_ids: Tensor | None = None,
) -> DivergenceOutput:
    return linear_divergence(
        first[0],
        first[1].weight,
        second[0],
        second[1].weight,
        alpha=alpha,
        temperature=temperature,
        student_head=first[1].transform,
        teacher_head=second[1].transform,
        target_ids=target_ids,
    )


def _of_another(
    groups: Sequence[Group], g: int, builder: ContextBuilder, tokenizer: Any, positions: int | None
) -> list[Tensor] | None:
    """Builds the teacher's prompts of a group with the next other prompt's context; None where none is to be had."""
    own = groups[g]
    longest = max(len(rollout.completion_ids) for rollout in own.rollouts)
    for step in range(1, len(groups)):
        other = groups[(g + step) % len(groups)]
        if other.example.prompt == own.example.prompt:
            continue
        example = replace(other.example, prompt=own.example.prompt)
        try:
            seen = builder.condition(replace(other, example=example, prompt_ids=own.prompt_ids), tokenizer)
        except SdcoreError:  # such as a context too long for this prompt: another one may fit
            continue
        prompts = [
            prompt
            for prompt, is_active in zip(seen.teacher_prompts, seen.active, strict=True)
            if is_active and (positions is None or len(prompt) + longest - 1 <= positions)
        ]
        if prompts:
            return prompts
    return None


def _few(groups: Sequence[Group], wanted: Sequence[Sequence[bool]], most: int) -> list[tuple[int, int]]:
    """Picks at most so many (group, completion): wanted ones with tokens, one of each group first; never none."""
    by_turn = []
    for g, group in enumerate(groups):
        here = [i for i, rollout in enumerate(group.rollouts) if wanted[g][i] and len(rollout.completion_ids)]
        by_turn += [(turn, g, i) for turn, i in enumerate(here)]
    return [(g, i) for _, g, i in sorted(by_turn)[:most]] or [(0, 0)]


def _counted(plan: Plan, chosen: Sequence[_Chosen]) -> Tensor:
    """Returns (n,) int64, the rows of the first pass over the completions that count."""
    slices = plan.rows[: len(chosen)]
    ranges = [torch.arange(at.start, at.stop) for (at,), picked in zip(slices, chosen, strict=True) if picked.counts]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)


def _run(
    model: nn.Module, chosen: Sequence[_Chosen], teacher: Teacher | TrustRegion | None, strategy: Strategy
) -> _Rows:
    """Computes both sides' states; with several teacher's prompts each completion comes once for each of them."""
    if isinstance(teacher, TrustRegion):
        teacher = teacher.reference
    body: Body = find_body(model)
    passes_over = range(len(chosen[0].prompts))
    turns = [(picked, picked.prompts[turn]) for turn in passes_over for picked in chosen]
    plan = plan_of(
        [picked.group.prompt_ids.to(body.device) for picked, _ in turns],
        [[picked.ids.to(body.device)] for picked, _ in turns],
        [prompt.to(body.device) for _, prompt in turns],
    )
    student = teacher_states = None
    rows: TeacherRows | None = None
    for part in passes(model, plan, teacher=teacher, strategy=strategy).parts:
        rows = part.teachers[0]
        if student is None or teacher_states is None:
            student = part.student_hidden.new_empty(plan.num_rows, part.student_hidden.shape[1])
            teacher_states = rows.hidden.new_empty(plan.num_rows, rows.hidden.shape[1])
        student[part.rows], teacher_states[part.rows] = part.student_hidden, rows.hidden
    student, teacher_states, rows = cast(Tensor, student), cast(Tensor, teacher_states), cast(TeacherRows, rows)
    own = head_of(body)
    head = Head(own.weight.detach(), own.transform)
    taught = head if rows.weight is None else Head(rows.weight, cast(LogitTransform, rows.transform))
    return _Rows(plan, own.states(student), head, rows._replace(hidden=teacher_states).states(own), taught)
