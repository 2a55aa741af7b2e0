"""Turns judged groups into gradients: what carries a loss, how much of it, and which step computes it.

    batch = Batch.of(groups, conditioned, method, device=device)          # plan, masks, weights
    normalizers = sum of batch.normalizers over accumulation and ranks
    out = update(model, batch, method, normalizers=normalizers, teacher=teacher, backward=accelerator.backward)

| `method.target` | step | carries a loss |
|---|---|---|
| divergence | `distill_step`, in mixtures with a policy gradient in the same pass | active completions |
| token_tilt | `distill_step` with a `TokenTilt` of the advantages | active and judged completions |
| tilt | `tilt_step` against the reference | judged completions |
| policy_gradient | `policy_gradient_step` | judged completions |
| imitation | `imitate_step` | all |

What differs from the obvious: a batch is prepared as a whole, before anything goes backward, because what its losses
are divided by is a sum over all batches of an optimizer step on all ranks.

Not covered: sampling, rewards and the optimizer, which are the trainer's.

Letters: B groups, S completions in all, T turns of the student in all, N tokens of those that carry a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import NotFiniteError
from ..losses import PolicyTerm, Tilted, TokenTilt, group_advantages, token_weights
from ..losses.token_weighting import per_completion, spread
from ..prefix import Plan
from ..prefix import plan as plan_of
from ..prefix.choice import Strategy
from ..prefix.verification import Verify
from ..presets.method import Method
from ..step import StepOutput, distill_step, imitate_step, policy_gradient_step, tilt_step, token_logprobs
from ..step.parts import Backward
from ..teachers import Teacher, TrustRegion
from ..types import Conditioned, Group
from .turns import active_turns, plan_turns


class Normalizers(NamedTuple):
    """Holds what the losses of a step are divided by; those of its parts add up."""

    divergence: float = 0.0
    policy: float = 0.0  # of the policy gradient, or of the tilt


def require_finite(norm: Any, step: int) -> None:
    """Raises `NotFiniteError` for the norm of a gradient that would make weights NaN."""
    if not math.isfinite(norm):
        raise NotFiniteError(
            f"step {step}: the gradient's norm is {float(norm)}, which would make the weights NaN: go on from the last "
            "checkpoint with a lower learning_rate, or in float32"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Holds groups, and everything that an update on them needs. Tensors are on the model's device."""

    groups: tuple[Group, ...]  # B
    conditioned: tuple[Conditioned, ...]  # B
    plan: Plan
    turns: tuple[tuple[int, ...], ...]  # S, of each of the student's turns its rows in the plan: 0 without a loss
    tokens: int  # of all completions
    rewards: Tensor  # (S,) float32; NaN where a completion was not judged
    judged: Tensor  # (S,) bool
    taught: Tensor  # (S,) bool: the divergence has something to say
    divergence_weights: Tensor  # (N,) float32
    policy_weights: Tensor  # (N,) float32
    old_logprobs: Tensor | None  # (N,) float32; None for completions from data
    normalizers: Normalizers  # this batch's own
    counts: dict[str, int]  # for the log

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        conditioned: Sequence[Conditioned],
        method: Method,
        *,
        device: torch.device | str = "cpu",
        norm_length: int | None = None,
        must_be_judged: bool = False,
        mask_truncated: bool = False,
    ) -> Batch:
        """Plans the passes, and weighs the tokens.

        `must_be_judged`: completions without a reward carry no loss (there were reward functions, and they failed).
        `mask_truncated`: nor do those that were cut. `norm_length` is for the aggregation "sum-norm".
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        turns_S = [[len(turn.ids) for turn in rollout.own] for rollout in rollouts]
        turns = [length for of_rollout in turns_S for length in of_rollout]  # T turns of the student
        counts, lengths = [len(of_rollout) for of_rollout in turns_S], [sum(of_rollout) for of_rollout in turns_S]
        sizes = [len(group.rollouts) for group in groups]
        rewards = torch.tensor([float("nan") if r.reward is None else r.reward for r in rollouts])
        whole = torch.tensor(
            [r.finished or (not mask_truncated and r.outcome != "failed") for r in rollouts], dtype=torch.bool
        )
        judged = ~rewards.isnan() & whole
        active = torch.tensor(active_turns(groups, conditioned), dtype=torch.bool)
        taught = whole & (judged if must_be_judged or method.target == "token_tilt" else True)
        taught_T = active & spread(taught, counts)
        if method.target == "imitation":
            taught_T = spread(whole, counts)
        positions = torch.cat([torch.arange(length) for length in turns] or [torch.zeros(0, dtype=torch.int64)])
        counted = positions >= method.skip_first_tokens  # (N,)
        by_turn = method.aggregation == "turn-mean-token-mean"
        aggregation: Any = "seq-mean-token-mean" if by_turn else method.aggregation
        parts = []
        for carries_T in (taught_T, spread(judged, counts)):
            mask = counted & spread(carries_T, turns)
            parts.append(token_weights(aggregation, turns if by_turn else lengths, mask, norm_length=norm_length))
        (divergence_weights, of_divergence), (policy_weights, of_policy) = parts
        if method.target == "tilt":
            has_tokens = per_completion(policy_weights, lengths) > 0
            of_policy = _tilted(method).num_groups(sizes, judged & has_tokens)
        loss_weights = policy_weights if method.target in ("tilt", "policy_gradient") else divergence_weights
        if method.distillation_weight < 1:
            loss_weights = loss_weights + policy_weights
        carries = per_completion((loss_weights != 0).float(), turns) > 0
        # What carries no loss is not computed at all: to the plan it is an empty turn.
        left = iter(length * bool(one) for length, one in zip(turns, carries.tolist(), strict=True))
        planned = tuple(tuple(next(left) for _ in of_rollout) for of_rollout in turns_S)
        rows = spread(carries, turns)
        old = [rollout.logprobs for rollout in rollouts]
        known = [logprobs for logprobs in old if logprobs is not None]
        return cls(
            groups=tuple(groups),
            conditioned=tuple(conditioned),
            plan=_plan(groups, planned, conditioned if method.has_teacher else None, device),
            turns=planned,
            tokens=len(rows),
            rewards=rewards.to(device),
            judged=judged.to(device),
            taught=(per_completion(taught_T.float(), counts) > 0).to(device),
            divergence_weights=divergence_weights[rows].to(device),
            policy_weights=policy_weights[rows].to(device),
            old_logprobs=torch.cat(known)[rows].to(device) if len(known) == len(old) else None,
            normalizers=Normalizers(of_divergence, of_policy),
            counts={
                "completions/count": len(rollouts),
                "completions/by_teacher": sum(rollout.by_teacher for rollout in rollouts),
                "completions/without_loss": sum(not any(of_rollout) for of_rollout in planned),
                "completions/truncated_masked": int((~whole).sum()),
            },
        )

    def flops(self, parameters: int) -> int:
        """Counts six per weight and token of the student, two of the teacher's; shared tokens once."""
        student, teacher = (
            sum(tree.tokens(read_shared=False) for tree in trees) for trees in (self.plan.student, self.plan.teacher)
        )
        return (6 * student + 2 * teacher) * parameters

    @property
    def lengths(self) -> list[int]:
        """Are the rows of each completion, S."""
        return [sum(of_rollout) for of_rollout in self.turns]

    @property
    def sizes(self) -> list[int]:
        return [len(group.rollouts) for group in self.groups]

    def weights(self, method: Method) -> Tensor:
        """Returns the weights of the loss that is logged per token, (N,)."""
        return self.policy_weights if method.target in ("tilt", "policy_gradient") else self.divergence_weights


def update(
    model: nn.Module,
    batch: Batch,
    method: Method,
    *,
    normalizers: Normalizers | None = None,
    teacher: Teacher | TrustRegion | None = None,
    reference: Teacher | None = None,
    off_policy: bool = False,
    sampling_temperature: float = 1.0,
    micro_batch: int | None = None,
    max_tokens: int | None = None,
    strategy: Strategy = "auto",
    verify: Verify = "once",
    backward: Backward = Tensor.backward,
) -> StepOutput:
    """Computes the gradients of one batch.

    Args:
        normalizers: of the whole step; None: the batch is the whole step.
        teacher, reference: from `method.build_teacher` and `method.build_reference`.
        off_policy: the student has learned since it sampled, or something else sampled: the policy gradient then needs
            the sampler's log-probabilities.
        sampling_temperature: of the completions, for targets that are about the policy that sampled.
        micro_batch, max_tokens, strategy, verify: how the passes are run; see `distill_step`.

    Raises what the step raises.
    """
    totals = batch.normalizers if normalizers is None else normalizers
    run: dict[str, Any] = {"backward": backward, "micro_batch": micro_batch, "max_tokens": max_tokens}
    run |= {"strategy": strategy, "verify": verify}
    divergence: dict[str, Any] = {"token_weights": batch.divergence_weights, "normalizer": totals.divergence}
    if method.target == "imitation":
        return imitate_step(model, batch.plan, **divergence, **run)
    if method.target == "tilt":
        return tilt_step(
            model,
            batch.plan,
            batch.rewards,
            target=_tilted(method),
            reference=reference,
            completion_mask=batch.policy_weights != 0,
            normalizer=totals.policy,
            temperature=sampling_temperature,
            **run,
        )
    if method.target == "policy_gradient":
        term = _policy(batch, method, totals.policy, off_policy, sampling_temperature)
        return policy_gradient_step(model, batch.plan, term, reference=reference, **run)
    loss = method.build_loss()
    if method.target == "token_tilt":
        tilt = TokenTilt(exponents=method.inv_temperature * _advantages(batch, method))
        return distill_step(model, batch.plan, loss=loss, teacher=teacher, tilt=tilt, **divergence, **run)
    policy = None
    if method.distillation_weight < 1:
        policy = replace(
            _policy(batch, method, totals.policy, off_policy, sampling_temperature),
            distillation_weight=method.distillation_weight,
            reference_logprobs=token_logprobs(
                model, batch.plan, teacher=reference, temperature=sampling_temperature, verify=verify
            )
            if method.kl_anchor and reference is not None
            else None,
        )
    return distill_step(
        model,
        batch.plan,
        loss=loss,
        teacher=teacher,
        old_logprobs=None if method.importance_clip is None else batch.old_logprobs,
        policy=policy,
        **divergence,
        **run,
    )


def _policy(batch: Batch, method: Method, normalizer: float, off_policy: bool, temperature: float) -> PolicyTerm:
    completions = torch.arange(len(batch.lengths), device=batch.rewards.device)
    return PolicyTerm(
        advantages=_advantages(batch, method),
        old_logprobs=batch.old_logprobs if off_policy else None,
        clip_low=method.clip_low,
        clip_high=method.clip_high,
        token_weights=batch.policy_weights,
        normalizer=normalizer,
        kl_anchor=method.kl_anchor,
        temperature=temperature,
        completion_of=spread(completions, batch.lengths) if method.ratio_of == "completion" else None,
    )


def _advantages(batch: Batch, method: Method) -> Tensor:
    """Returns each token's advantage, that of its completion, (N,)."""
    values = group_advantages(batch.rewards, batch.sizes, estimator=method.advantages, active=batch.judged)
    return spread(values, batch.lengths)


def _tilted(method: Method) -> Tilted:
    return Tilted(inv_temperature=method.inv_temperature, logz=method.logz)


def _plan(
    groups: Sequence[Group], turns: Sequence[Sequence[int]], conditioned: Sequence[Conditioned] | None, device: Any
) -> Plan:
    """Plans the turns that have a length; a teacher's prompt that the whole group has is given once."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    of_turns = conditioned is not None and any(seen.turns is not None for seen in conditioned)
    if of_turns or any(len(rollout.turns) > 1 for rollout in rollouts):
        return plan_turns(groups, turns, conditioned, device)
    prompts, left = [group.prompt_ids.to(device) for group in groups], iter(turns)
    completions = [
        [rollout.completion_ids[: sum(next(left))].to(device) for rollout in group.rollouts] for group in groups
    ]
    if conditioned is None:
        return plan_of(prompts, completions)
    teachers: list[Tensor | list[Tensor]] = []
    for seen in conditioned:
        first = seen.teacher_prompts[0]
        same = all(prompt is first or torch.equal(prompt, first) for prompt in seen.teacher_prompts)
        teachers.append(first.to(device) if same else [prompt.to(device) for prompt in seen.teacher_prompts])
    return plan_of(prompts, completions, teachers)
