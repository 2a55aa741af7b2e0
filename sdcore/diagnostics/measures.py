"""Computes the metrics of a step that cost nothing: counts of what was sampled, averages of what the loss computed.

Names and meanings are in `keys`. A share is of what it can be a share of: without any reward there is no mean reward
and no flat group, and the name is left out rather than 0.

What differs from the obvious: token sums of the context builders are logged as a share and a mean, over the active
completions, and every other count of theirs as it is.

Not covered: averages over ranks and accumulation steps, which the trainer takes; a name may be missing on one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from sdkernels.types import float64_device, in_float64

from ..errors import ArgumentError
from ..prefix import Plan
from ..prefix.planner import common_prefix
from ..step import StepOutput
from ..types import Conditioned, Group

# Positions of a completion whose divergence is logged by itself.
FIRST_TOKENS: Final = 4
# What the builders count, and what is logged as shares and means in its place.
WITH_FEEDBACK: Final = "context/with_feedback"
SUMS: Final = frozenset({"context/prompt_tokens", "context/shared_tokens", "context/teacher_tokens"})


def metrics(
    groups: Sequence[Group],
    conditioned: Sequence[Conditioned],
    step_output: StepOutput | None = None,
    *,
    plan: Plan | None = None,
    token_weights: Tensor | None = None,
    success_threshold: float = 0.5,
    flat_tolerance: float = 0.0,
) -> dict[str, float]:
    """Returns what a step says, under the names in `KEYS`.

    Args:
        groups, conditioned: what was sampled for B prompts, and what the teacher saw of each.
        step_output: of the update on these completions; None where there was none.
        plan: of that update, for what is known per token; its completions are those of `groups`, in order.
        token_weights: (N,), those given to the step; None: all 1.
        success_threshold: reward from which a completion is a success.
        flat_tolerance: rewards of a group are alike where their standard deviation is at most this.

    One copy from the device for all of it. Raises `ArgumentError` for lists and rows that do not fit each other.
    """
    check_one_per_group(groups, conditioned)
    for i, (group, seen) in enumerate(zip(groups, conditioned, strict=True)):
        if not len(group.rollouts) == len(seen.active) == len(seen.teacher_prompts):
            raise ArgumentError(
                f"conditioned[{i}] must have one entry per completion, {len(group.rollouts)}, got "
                f"{len(seen.active)} of active and {len(seen.teacher_prompts)} of teacher_prompts"
            )
    sampled = _rewards(groups, success_threshold, flat_tolerance) | _completions(groups)
    sampled |= _contexts(groups, conditioned)
    return sampled if step_output is None else sampled | _step(step_output, plan, token_weights)


def check_one_per_group(groups: Sequence[Group], conditioned: Sequence[Conditioned]) -> None:
    """Raises `ArgumentError` where the teacher did not see each of some groups."""
    if len(groups) != len(conditioned) or not groups:
        raise ArgumentError(f"conditioned must have one entry per group, got {len(groups)} and {len(conditioned)}")


def _rewards(groups: Sequence[Group], threshold: float, tolerance: float) -> dict[str, float]:
    students_B = [[r for r in group.rollouts if not r.by_teacher] for group in groups]
    rewards_B = [[r.reward for r in rollouts if r.reward is not None] for rollouts in students_B]
    judged = [reward for rewards in rewards_B for reward in rewards]
    completions = sum(len(group.rollouts) for group in groups)
    spoken = sum(bool(r.feedback and r.feedback.strip()) for group in groups for r in group.rollouts)
    shares = {"self_distillation/feedback_available_fraction": spoken / completions}
    if not judged:
        return shares
    compared = [rewards for rewards in rewards_B if rewards]
    # A completion alone has nothing to be alike to.
    flat = [_deviation(rewards) <= tolerance for rewards in compared if len(rewards) > 1]
    if flat:
        shares["self_distillation/flat_group_fraction"] = _mean(flat)
    return shares | {
        "self_distillation/reward_mean": sum(judged) / len(judged),
        "self_distillation/reward_std": _deviation(judged),
        "self_distillation/success_group_fraction": _mean([max(rewards) >= threshold for rewards in compared]),
        "self_distillation/unjudged_fraction": 1 - len(judged) / sum(map(len, students_B)),
    }


def _completions(groups: Sequence[Group]) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    return {
        "completions/mean_length": _mean(lengths),
        "completions/clipped_ratio": _mean([not rollout.finished for rollout in rollouts]),
        "completions/empty_ratio": _mean([length == 0 for length in lengths]),
    }


def _contexts(groups: Sequence[Group], conditioned: Sequence[Conditioned]) -> dict[str, float]:
    counts: Counter[str] = Counter({"context/overflow": 0})
    for seen in conditioned:
        counts.update(seen.counts)
    active = [is_active for seen in conditioned for is_active in seen.active]
    shared = added = student = prompts = 0
    for group, seen in zip(groups, conditioned, strict=True):
        known: dict[int, int] = {}  # one prompt is often the teacher's for all completions of a group
        for prompt, is_active in zip(seen.teacher_prompts, seen.active, strict=True):
            if not is_active:
                continue
            if id(prompt) not in known:
                known[id(prompt)] = common_prefix(group.prompt_ids, prompt)
            shared += known[id(prompt)]
            student += len(group.prompt_ids)
            added += len(prompt) - len(group.prompt_ids)
            prompts += 1
    contexts = {name: float(count) for name, count in counts.items() if name not in SUMS}
    contexts["self_distillation/reprompt_sample_fraction"] = _mean(active)
    contexts["self_distillation/feedback_used_fraction"] = counts[WITH_FEEDBACK] / len(active)
    if prompts:
        contexts |= {"context/shared_fraction": shared / max(1, student), "context/added_tokens": added / prompts}
    return contexts


def _step(output: StepOutput, plan: Plan | None, token_weights: Tensor | None) -> dict[str, float]:
    device = float64_device(output.loss.device)
    # The loss of a mixture with a policy gradient is more than the distillation.
    values = {"self_distillation/distillation_loss": output.metrics.get("loss/distillation", output.loss)}
    values |= output.metrics
    if {"student/entropy", "teacher/entropy"} <= output.metrics.keys():
        values["teacher/entropy_gap"] = output.metrics["student/entropy"] - output.metrics["teacher/entropy"]
    if plan is not None:
        values |= _tokens(output, plan, token_weights)
    names = list(values)
    numbers = torch.stack([in_float64(values[name].detach()).to(device) for name in names]).tolist()
    # A position that no row has is NaN there; what is NaN in the step itself stays, and the log names it.
    named = zip(names, numbers, strict=True)
    known = {name: number for name, number in named if number == number or not name.startswith("loss/position_")}
    return known | output.report.metrics


def _tokens(output: StepOutput, plan: Plan, token_weights: Tensor | None) -> dict[str, Tensor]:
    """Computes in float64 the active share, and the mean divergence at each of the first positions, each ()."""
    per_token = output.rows.get("per_token")
    if per_token is None:
        return {}
    for name, rows in (("rows", per_token), ("token_weights", token_weights)):
        if rows is not None and rows.shape != (plan.num_rows,):
            raise ArgumentError(f"{name} must be of shape (N={plan.num_rows},), got {tuple(rows.shape)}")
    weights = torch.ones_like(per_token) if token_weights is None else token_weights.to(per_token)
    active = weights != 0
    divergence = in_float64(torch.where(active, per_token / torch.where(active, weights, 1), 0.0))
    active = in_float64(active)
    values = {"loss/active_fraction": active.sum() / max(1, plan.num_rows)}
    slices = [rows for group in plan.rows for rows in group]
    for position in range(FIRST_TOKENS):
        starts = [rows.start + position for rows in slices if rows.start + position < rows.stop]
        if starts:
            here = torch.tensor(starts, device=divergence.device)
            values[f"loss/position_{position}"] = divergence[here].sum() / active[here].sum()
    return values


def _deviation(values: Sequence[float]) -> float:
    """Computes the standard deviation of a sample, 0 of a single value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
