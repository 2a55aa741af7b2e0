"""Takes the steps that learn from rewards: by the policy gradient, or towards the reference tilted by the reward.

    tilt_step(model, plan, rewards, target=Tilted(inv_temperature=2.0), reference=AdapterOff())
    policy_gradient_step(model, plan, PolicyTerm(advantages=advantages, old_logprobs=old))
    token_logprobs(model, plan, teacher=AdapterOff())                                  # (N,), without gradient

They need the log-probabilities of the sampled tokens only. A plan of the student's pass is enough; teacher's prompts,
if it has some, are not read: the reference sees what the student sees.

What differs from the obvious: the tilt's loss is a square over groups, so its gradient needs the log-probabilities of
all completions of a group. Where the pass comes in parts ("two_phase", `max_tokens`) they are computed ahead, without
gradient, which costs one more forward, or are given as `student_logprobs`.

Not covered: rewards of single tokens; give `advantages` of your own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sdkernels import linear_logprobs

from ..losses import FusedLinearDivergence, PolicyTerm, Tilted, TiltOutput, per_completion, spread
from ..losses.policy_gradient import KLEstimator
from ..models import head_of
from ..prefix.choice import Strategy
from ..prefix.planner import Plan
from ..prefix.runner import passes, run
from ..prefix.verification import Verify
from ..teachers import Teacher
from ..teachers.weights import checked_teacher
from .checks import check_tilt_step, checked_policy, checked_reference, checked_rows
from .parts import MEANS, POLICY_MEANS, Backward, Divergence, StepOutput, run_parts


@torch.no_grad()
def token_logprobs(
    model: nn.Module,
    plan: Plan,
    *,
    teacher: Teacher | None = None,
    temperature: float = 1.0,
    strategy: Strategy = "auto",
    verify: Verify = "once",
) -> Tensor:
    """Returns (N,) the log-probability of each completion token after the *student's* prompt, without gradient.

    `teacher` says under whose weights; None: the model's own, as they are. `strategy` is for the model itself, and
    "two_phase", which only bounds the memory of a backward, is "auto" here. Raises what `run` raises.
    """
    plan = replace(plan, teachers=())
    around = nullcontext(model)
    if teacher is not None and not checked_teacher("teacher", teacher).shares_weights:
        around, strategy = teacher.weights(model), "auto"
    with around as module:
        strategy = "auto" if strategy == "two_phase" else strategy
        hidden = run(module, plan, strategy=strategy, verify=verify).student_hidden
        head = head_of(module)
        hidden = head.states(hidden)
        out = linear_logprobs(hidden, head.weight, plan.target_ids, head=head.transform, temperature=temperature)
    return cast(Tensor, out.logprobs)  # None only without targets


def policy_gradient_step(
    model: nn.Module,
    plan: Plan,
    policy: PolicyTerm,
    *,
    reference: Teacher | None = None,
    kl_estimator: KLEstimator = "k3",
    micro_batch: int | None = None,
    max_tokens: int | None = None,
    strategy: Strategy = "auto",
    verify: Verify = "once",
    backward: Backward | None = Tensor.backward,
) -> StepOutput:
    """Makes more likely what was better than its group: the clipped policy gradient, with an anchor if it has one.

    Args:
        model, plan, micro_batch, max_tokens, strategy, verify, backward: as in `distill_step`.
        policy: advantages, bounds, weights and normalizer of the tokens; its `distillation_weight` must be 0.
        reference: whose weights `policy.kl_anchor` holds on to; None where `policy.reference_logprobs` are given, or
            there is no anchor.
        kl_estimator: "k3" of the sampled token, or "exact" of the full distributions; see `losses.policy_gradient`.

    Accumulates gradients of the weighted mean. Raises `ArgumentError` and `PlanError` before any pass.
    """
    policy = checked_policy(plan, policy, reference, kl_estimator)
    divergence = None
    plan = replace(plan, teachers=())
    if policy.kl_anchor and kl_estimator == "exact":
        # The reference reads what the student reads.
        plan = replace(plan, teachers=(plan.student,))
        divergence = Divergence(
            FusedLinearDivergence(temperature=policy.temperature), policy.token_weights, policy.total, policy.kl_anchor
        )
    elif policy.kl_anchor and reference is not None:
        logprobs = token_logprobs(model, plan, teacher=reference, temperature=policy.temperature, verify=verify)
        policy = replace(policy, reference_logprobs=logprobs)
    planned = passes(
        model,
        plan,
        teacher=reference if divergence else None,
        strategy=strategy,
        micro_batch=micro_batch,
        max_tokens=max_tokens,
        verify=verify,
        whole=backward is None,
    )
    loss, row_values = run_parts(model, plan, planned, divergence=divergence, term=policy, backward=backward)
    rows = row_values.by_name
    if divergence is None:
        rows["per_token"] = rows["policy"]
    else:
        # With the divergence came its values, which are those of the anchor here.
        for name in ("logprobs", "entropy"):
            rows[f"reference_{name}"] = rows.pop(f"teacher_{name}")
        weights = 1.0 if policy.token_weights is None else policy.token_weights
        rows["anchor"] = (rows["per_token"] / weights).nan_to_num(nan=0.0)
        rows["per_token"] = rows["policy"] + policy.kl_anchor * rows["per_token"]
    metrics = row_values.metrics(policy.token_weights, MEANS | POLICY_MEANS) | {"loss/policy": loss}
    return StepOutput(loss, metrics, planned.report, rows)


def tilt_step(
    model: nn.Module,
    plan: Plan,
    rewards: Tensor,
    *,
    target: Tilted,
    reference: Teacher | None = None,
    reference_logprobs: Tensor | None = None,
    student_logprobs: Tensor | None = None,
    completion_mask: Tensor | None = None,
    log_z: Tensor | None = None,
    reference_rewards: Tensor | None = None,
    normalizer: float | None = None,
    temperature: float = 1.0,
    micro_batch: int | None = None,
    max_tokens: int | None = None,
    strategy: Strategy = "auto",
    verify: Verify = "once",
    backward: Backward = Tensor.backward,
) -> StepOutput:
    """Brings the student to the reference tilted by the reward, `p* ∝ p_ref·exp(inv_temperature·reward)`.

    Args:
        model, plan, micro_batch, max_tokens, strategy, verify, backward: as in `distill_step`.
        rewards: (S,) of the completions, in the plan's order.
        target: `Tilted(inv_temperature, logz)`.
        reference: whose weights p_ref has; None where its log-probabilities are given.
        reference_logprobs: (N,) of the tokens, as `token_logprobs` gives them.
        student_logprobs: (N,) of the student *as it is now*, which saves a forward where the pass comes in parts: the
            sampler's, if nothing was learned since and it sampled from the whole distribution. Elsewhere not used;
            the metric "tilt/reused_logprobs" says whether they were.
        completion_mask: (N,) bool, the tokens that count as the response; None: all. A completion without such a token
            (that was not judged, say) has no part in its group, whatever its reward.
        log_z, reference_rewards: for `logz` "exact" and "reference_lme", see `Tilted.loss`.
        normalizer: what the sum over the groups is divided by; None: how many have a loss. `target.num_groups` of the
            parts of a larger step add up.
        temperature: at which the completions were sampled; divides the logits of both policies.

    Accumulates gradients. Raises `ArgumentError` and `PlanError` before any pass.
    """
    sizes = [len(group) for group in plan.counts]
    lengths = [count for group in plan.counts for count in group]
    check_tilt_step(plan, rewards, len(lengths), reference, reference_logprobs, completion_mask, normalizer)
    student_logprobs = checked_rows("student_logprobs", plan, student_logprobs)
    reference_logprobs = checked_rows("reference_logprobs", plan, reference_logprobs)
    mask = None if completion_mask is None else completion_mask.to(plan.device).float()
    active = per_completion(torch.ones(plan.num_rows, device=plan.device) if mask is None else mask, lengths) > 0

    def loss_of(logprobs: Tensor, reference: Tensor) -> TiltOutput:
        """Returns the loss of log-probabilities of whole completions, (S,)."""
        return target.loss(
            logprobs,
            reference.to(logprobs.dtype),
            rewards.to(plan.device),
            sizes,
            active=active,
            log_z=log_z,
            reference_rewards=reference_rewards,
            normalizer=normalizer,
        )

    nothing = torch.zeros(len(lengths), device=plan.device)
    loss_of(nothing, nothing)  # refuses what does not fit, before any pass
    plan = replace(plan, teachers=())
    if reference_logprobs is None:
        reference_logprobs = token_logprobs(
            model, plan, teacher=checked_reference(reference), temperature=temperature, verify=verify
        )
    planned = passes(model, plan, strategy=strategy, micro_batch=micro_batch, max_tokens=max_tokens, verify=verify)
    in_parts = max_tokens is not None or planned.report.student.strategy == "two_phase"
    reused = in_parts and student_logprobs is not None
    term = _TiltTerm(loss_of, lengths, reference_logprobs, mask, temperature)
    if in_parts:
        if student_logprobs is None:
            student_logprobs = token_logprobs(model, plan, temperature=temperature, verify=verify)
        term.look_ahead(student_logprobs)
    _, rows = run_parts(model, plan, planned, term=term, backward=backward)
    out = cast(TiltOutput, term.out)
    used, log_ratios = out.used.float(), per_completion(rows.by_name["per_token"], lengths)
    count = used.sum().clamp(min=1)
    gap = (out.gap * used).sum() / count
    metrics = rows.metrics(mask, MEANS) | {
        "tilt/gap": gap,
        "tilt/gap_std": (((out.gap - gap).square() * used).sum() / count).sqrt(),
        "tilt/reference_kl": (log_ratios * used).sum() / count,
        "tilt/completions": used.sum(),
        "tilt/reused_logprobs": torch.tensor(float(reused), device=plan.device),
    }
    return StepOutput(out.loss.detach(), metrics, planned.report, rows.by_name)


@dataclass(eq=False)
class _TiltTerm:
    """Makes the tilt's loss a term of a step: of all rows at once, or of parts, with derivatives known ahead."""

    loss_of: Callable[[Tensor, Tensor], TiltOutput]
    lengths: list[int]
    reference_logprobs: Tensor  # (N,)
    token_weights: Tensor | None  # (N,) 0 and 1
    temperature: float
    out: TiltOutput | None = None
    coefficients: Tensor | None = None  # (N,)

    def look_ahead(self, logprobs: Tensor) -> None:
        """Takes the derivatives from these (N,) log-probabilities."""
        self.out = self.loss_of(self._whole(logprobs), self._whole(self.reference_logprobs))
        self.coefficients = spread(self.out.coefficients, self.lengths)

    def scalar(self, rows: Tensor | slice, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        reference = self.reference_logprobs[rows]
        values = {"per_token": logprobs - reference, "reference_logprobs": reference}
        if self.coefficients is not None:
            return (self.coefficients[rows] * logprobs).sum(), values
        everything = logprobs.new_zeros(sum(self.lengths))
        everything = logprobs if isinstance(rows, slice) else everything.index_copy(0, rows, logprobs)
        self.out = self.loss_of(self._whole(everything), self._whole(self.reference_logprobs))
        return self.out.loss, values

    def _whole(self, logprobs: Tensor) -> Tensor:
        """Sums the (N,) log-probabilities of tokens to those of whole completions, (S,)."""
        if self.token_weights is not None:
            logprobs = torch.where(self.token_weights != 0, logprobs, 0.0)
        return per_completion(logprobs, self.lengths)
