"""Chooses the strategy that runs a plan, and says why.

"auto" takes the one that reads the fewest tokens among those that can run the model exactly and fit its memory. Where
sharing would save next to nothing, or nothing else works, it is "naive". What was wanted and not taken goes into the
report with its reason, and a model that is run without sharing is warned about once.

What differs from the obvious: under several ranks all choose alike (`ranks.most`), since collectives must match. A
teacher with a model of its own gets the student's strategy, or naive where that one is not right for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from sdkernels.live_bytes import free_bytes

from ..errors import ArgumentError, UnsupportedModelError
from ..models import Body, find_body
from ..teachers import Snapshot, Teacher
from .costs import Cost, cost
from .planner import Plan, check_against
from .report import Choice, Fallback
from .strategies import cached, naive, packed, ranks, two_phase
from .strategies.caches import require_readable
from .strategies.schedule import schedule
from .tree import Tree
from .verification import Verify, disagreement

Strategy = Literal["auto", "packed", "cached", "two_phase", "naive"]
STRATEGIES = {"packed": packed, "cached": cached, "two_phase": two_phase, "naive": naive}
# Sharing that saves less than this share of the tokens is not worth another code path.
LEAST_SAVING = 0.05
# What all completions at once may keep for backward, of the memory that is free.
MOST_OF_FREE = 0.7
WITHOUT_SHARING = "is run without sharing prefixes (strategy naive)"


def choose(
    body: Body, plan: Plan, strategy: Strategy, micro_batch: int | None, shares: bool, verify: Verify, whole: bool
) -> tuple[Choice, list[Fallback]]:
    """Returns the student's strategy with its reason, and what was wanted but not taken.

    `shares`: a teacher reads the student's states. `whole`: memory is not for this to bound. Raises
    `UnsupportedModelError` where a strategy was asked for by name and is not right for this model.
    """
    trees = [tree for trees, _ in plan.sides(teacher_shares=shares) for tree in trees]
    if strategy != "auto":
        if (obstacle := _obstacle(body, trees, strategy)) is not None:
            raise UnsupportedModelError(obstacle)
        if strategy != "naive" and verify != "off":
            problem = disagreement(body, STRATEGIES[strategy], plan, verify)
            if problem is not None:
                raise UnsupportedModelError(f"strategy {strategy!r} disagrees with naive: {problem}")
        return _chosen(body, plan, strategy, "asked for"), []
    shortage = "" if whole or micro_batch is not None or body.one_backward else _shortage(body, plan, shares)
    # All ranks choose alike: what is worth it on one of them, or does not fit, decides.
    saving, short = ranks.most(body, _saving(plan, shares), shortage != "")
    if saving < LEAST_SAVING and micro_batch is None:
        return _chosen(body, plan, "naive", f"sharing would save {saving:.0%} of the tokens"), []
    if micro_batch is not None:
        wanted = {"two_phase": f"micro_batch={micro_batch} bounds the memory"}
    elif short:
        wanted = {"two_phase": shortage or "on another rank all completions at once would not fit the memory"}
    else:
        wanted = {"packed": "no token twice and no padding", "cached": "no token twice"}
    fallbacks: list[Fallback] = []
    for name, reason in wanted.items():
        refusal = _refusal(body, trees, name, plan, verify)
        if refusal is None:
            return _chosen(body, plan, name, reason), fallbacks
        fallbacks.append(Fallback(name, refusal))
    _warn_once(body, WITHOUT_SHARING, fallbacks[-1].reason)
    return _chosen(body, plan, "naive", "nothing else works for this model"), fallbacks


def choose_for_teacher(body: Body, teacher: Teacher, plan: Plan, students: Choice, verify: Verify) -> Choice:
    """Returns the student's choice where it is right for the teacher's model too, else naive with the reason."""
    if _runs_the_student(teacher) or students.strategy == "naive":
        return students
    with teacher.weights(body.model) as module:
        own = find_body(module)
        refusal = _refusal(own, plan.teacher, students.strategy, plan, verify)
        if refusal is None:
            return students
        _warn_once(own, WITHOUT_SHARING, refusal)
        return _chosen(own, replace(plan, student=()), "naive", refusal)


def require_fits(body: Body, teacher: Teacher, plan: Plan, vocab_size: int | None = None) -> None:
    """Refuses a teacher with a model of its own that cannot read the plan, or has another vocabulary.

    `vocab_size` says how many logits are real: beyond them both models have padding, each its own.
    """
    if _runs_the_student(teacher):
        return
    with teacher.weights(body.model) as module:
        own = find_body(module)
        if own.causal_lm is body.causal_lm:
            return
        known = own.num_logits if vocab_size is None else min(vocab_size, own.num_logits)
        if known != (body.num_logits if vocab_size is None else vocab_size):
            real = "" if vocab_size is None else f", of which vocab_size={vocab_size} are real"
            raise ArgumentError(
                f"teacher must have the student's vocabulary, {body.num_logits} logits a token{real}, got "
                f"{own.num_logits}; where the padding differs, the loss's vocab_size says so"
            )
        # The completions are among what the student reads, but its prompts are not the teacher's to read.
        check_against(plan, vocab_size=own.vocab_size, max_positions=None, device=own.device)
        read = replace(plan, student=())
        check_against(read, vocab_size=own.vocab_size, max_positions=own.max_positions, device=own.device)


def counted_cost(plan: Plan, body: Body, strategy: str, shares: bool) -> Cost | None:
    """Counts what the plan costs in this model; None, with a warning, where its configuration does not say it."""
    try:
        return cost(plan, body.config, strategy=strategy, teacher_shares=shares, dtype_bytes=body.dtype.itemsize)
    except UnsupportedModelError as error:
        _warn_once(body, "is not counted, so that reports have no FLOPs and its memory is not looked at", str(error))
        return None


def _runs_the_student(teacher: Teacher) -> bool:
    """True where the teacher's pass runs the student's own module.

    A snapshot is that module with other values, which may have to be moved in from elsewhere: it is not asked.
    """
    return teacher.shares_weights or isinstance(teacher, Snapshot)


def _refusal(body: Body, trees: Sequence[Tree], strategy: str, plan: Plan, verify: Verify) -> str | None:
    """Says why this strategy cannot run this model, on any rank, or does so wrongly; None if it is right."""
    obstacle = _obstacle(body, trees, strategy)
    if strategy == "two_phase" and obstacle is None:
        obstacle = two_phase.unordered(body, plan.student)
    if ranks.most(body, obstacle is not None)[0]:
        return obstacle or f"the plan of another rank does not allow {strategy}"
    if verify == "off":
        return None
    try:
        return disagreement(body, STRATEGIES[strategy], plan, verify)
    except UnsupportedModelError as error:  # what only running it shows
        return str(error)


def _obstacle(body: Body, trees: Sequence[Tree], strategy: str) -> str | None:
    """Says why this strategy cannot run this model, as far as can be told without running it; None if it can."""
    if strategy == "packed":
        return packed.supports(body)
    if strategy == "two_phase" and (reason := two_phase.takes_one_backward(body)) is not None:
        return reason
    if strategy in ("cached", "two_phase"):
        try:
            with body.keeping_caches():
                require_readable(body, trees)
        except UnsupportedModelError as error:
            return str(error)
    return None


_WARNED: set[tuple[str, str]] = set()


def _warn_once(body: Body, what: str, reason: str) -> None:
    if (body.name, reason) not in _WARNED:
        _WARNED.add((body.name, reason))
        warnings.warn(f"{body.name} {what}: {reason}", stacklevel=2)


def _chosen(body: Body, plan: Plan, strategy: str, reason: str) -> Choice:
    """Adds to the choice which share of the batches' tokens is padding."""
    padded = filled = 0
    for tree in [tree for trees, _ in plan.sides(teacher_shares=False) for tree in trees if strategy != "packed"]:
        if strategy == "naive":
            buckets = naive.length_buckets(body, lengths := [length for length in tree.lengths if length])
            runs = [[lengths[i] for i in bucket] for bucket in buckets]
        else:
            runs = schedule(body, tree).lengths
        padded += sum(len(run) * max(run) for run in runs)
        filled += sum(sum(run) for run in runs)
    return Choice(strategy, reason, 1 - filled / padded if padded else 0.0)


def _saving(plan: Plan, shares: bool) -> float:
    """Returns the share of a naive run's tokens that need not be computed."""
    sides = [(tree, reads) for trees, reads in plan.sides(teacher_shares=shares) for tree in trees]
    naive_tokens = sum(tree.naive_tokens() for tree, _ in sides)
    tokens = sum(tree.tokens(read_shared=reads) for tree, reads in sides)
    return 1 - tokens / naive_tokens if naive_tokens else 0.0


def _shortage(body: Body, plan: Plan, shares: bool) -> str:
    """Says why all completions at once would not fit the free memory; "" where they would, as far as is known."""
    counted = counted_cost(plan, body, "packed", shares) if torch.is_grad_enabled() else None
    if counted is None:
        return ""
    free, kept = free_bytes(body.device), counted.student.kept_bytes
    if free is None or kept <= MOST_OF_FREE * free:
        return ""
    return f"all completions at once would keep {kept / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
