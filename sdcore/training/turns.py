"""Plans updates on trajectories: whose turns are learned, what their teachers read, and what there is to count.

    plan = plan_turns(groups, rows, conditioned, device)      # rows[s][t]: of turn t of trajectory s, 0 without a loss

Each sequence that the student read is a trajectory of the plan: two where a template has rewritten the past. A context
before a turn is a view of that turn. A context in the prompt is one view of the whole trajectory: the teacher reads its
own prompt, and goes on as the student did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import ContextError
from ..prefix import Plan, View, plan_trajectories
from ..prefix.planner import common_prefix
from ..types import Conditioned, Group, Outcome


def plan_turns(
    groups: Sequence[Group], rows: Sequence[Sequence[int]], conditioned: Sequence[Conditioned] | None, device: Any
) -> Plan:
    """Plans the turns that have rows, in the order group, trajectory, turn. Raises `ContextError` and `PlanError`."""
    sequences: list[Tensor] = []
    masks: list[Tensor] = []
    views: list[View] = []
    counts, left = [], iter(rows)
    for g, group in enumerate(groups):
        seen = None if conditioned is None else conditioned[g]
        rows_G = [next(left) for _ in group.rollouts]
        counts.append(tuple(map(sum, rows_G)))
        for i, rollout in enumerate(group.rollouts):
            turns = enumerate(zip(rollout.own, rows_G[i], strict=True))
            for ids, starts in rollout.sequences(group.prompt_ids):
                mask = torch.zeros(len(ids), dtype=torch.bool)
                for start in starts:
                    t, (turn, count) = next(turns)
                    mask[start : start + count] = True
                    context = None if seen is None or seen.turns is None or not count else seen.turns[i][t]
                    if context is not None:
                        read, begin = torch.cat([context, turn.ids]).to(device), len(context)
                        tokens, positions = range(start, start + count), range(begin, begin + count)
                        views.append(View(ids=read, trajectory=len(sequences), tokens=tokens, positions=positions))
                if seen is not None and seen.turns is None and seen.active[i] and bool(mask.any()):
                    read, shift = _read_by(seen.teacher_prompts[i], group, ids)
                    at = mask.nonzero()[:, 0]
                    views.append(View(ids=read.to(device), trajectory=len(sequences), tokens=at, positions=at + shift))
                if starts:
                    sequences.append(ids.to(device))
                    masks.append(mask)
    plan = plan_trajectories(sequences, masks, views, teachers=0 if conditioned is None else 1)
    # A trajectory of several sequences is one completion to whoever compares them.
    return replace(plan, counts=tuple(counts))


def active_turns(groups: Sequence[Group], conditioned: Sequence[Conditioned]) -> list[bool]:
    """Says of each of the student's turns whether its teacher has something to say."""
    active = []
    for group, seen in zip(groups, conditioned, strict=True):
        for i, rollout in enumerate(group.rollouts):
            turns = (
                [seen.active[i]] * len(rollout.own) if seen.turns is None else [x is not None for x in seen.turns[i]]
            )
            active += turns
    return active


def first_turns(
    groups: Sequence[Group], conditioned: Sequence[Conditioned]
) -> tuple[tuple[Group, ...], tuple[Conditioned, ...]]:
    """Returns what there is of the first turns alone, as answers, for what looks at a few completions."""
    cut = tuple(
        replace(group, rollouts=tuple(replace(rollout, turns=rollout.turns[:1]) for rollout in group.rollouts))
        for group in groups
    )
    firsts = tuple(
        seen if seen.turns is None else replace(seen, turns=None, active=tuple(x[0] is not None for x in seen.turns))
        for seen in conditioned
    )
    return cut, firsts


def counts_of(groups: Sequence[Group]) -> dict[str, int]:
    """Counts how trajectories ended, their turns, and what became of their calls; {} for answers of a run without."""
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.counts]
    if not rollouts:
        return {}
    counts = Counter({f"trajectories/{outcome}": 0 for outcome in get_args(Outcome)})
    for rollout in rollouts:
        counts[f"trajectories/{rollout.outcome}"] += 1
        counts["turns/count"] += len(rollout.own)
        counts.update(rollout.counts)
    return dict(counts)


def _read_by(teacher: Tensor, group: Group, ids: Tensor) -> tuple[Tensor, int]:
    """Returns a sequence as the teacher reads it, and by how many tokens what comes behind the prompt is later."""
    student = group.prompt_ids
    shift, same = len(teacher) - len(student), common_prefix(student, teacher)
    if torch.equal(ids[: len(student)], student):
        return torch.cat([teacher, ids[len(student) :]]), shift
    # The past was rewritten from the first answer on, so the prompt's end may be another.
    if shift < 0 or not torch.equal(teacher[same + shift :], student[same:]) or common_prefix(ids, student) < same:
        raise ContextError(
            f"{group.example.source}: a context must be one piece that is added to the prompt where the chat template "
            "rewrites the past (history='as_rendered'), got a teacher's prompt that is another one"
        )
    return torch.cat([teacher[: same + shift], ids[same:]]), shift
