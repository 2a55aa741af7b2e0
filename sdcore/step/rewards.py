"""Steps that learn from rewards: the policy gradient, and the reference tilted by the reward over whole responses.

    tilt_step(model, plan, rewards, target=Tilted(inv_temperature=2.0), reference=AdapterOff())
    policy_gradient_step(model, plan, PolicyTerm(advantages=advantages, old_logprobs=old))
    token_logprobs(model, plan, teacher=AdapterOff())                                  # (N,), without gradient

They need the log-probabilities of the sampled tokens only. A plan of the student's pass is enough; teacher's prompts,
if it has some, are not read: the reference sees what the student sees.

What differs from the obvious: the tilt's loss is a square over groups, so its gradient needs the log-probabilities of
all completions of a group. Where the pass comes in parts ("two_phase") they are computed ahead, without gradient, which
costs one more forward, or are given as `student_logprobs`.

Not covered: rewards of single tokens; give `advantages` of your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from sdkernels import linear_logprobs

from ..errors import ArgumentError
from ..losses import FusedLinearDivergence
from ..losses.aggregate import per_completion, spread
from ..losses.policy_gradient import PolicyTerm
from ..losses.tilt import Tilted, TiltOutput
from ..models import head_of
from ..prefix.checks import Verify
from ..prefix.choice import Strategy
from ..prefix.planner import Plan
from ..prefix.runner import passes, run
from ..teachers import Teacher
from .checks import check_tilt_step, checked_policy, checked_rows, require_own_weights
from .parts import MEANS, Backward, Divergence, StepOutput, run_parts

KLEstimator: TypeAlias = Literal["k3", "exact"]
# Row values that are averaged for the log, beside those of a divergence.
POLICY_MEANS = {"policy/anchor": "anchor", "policy/clipped_fraction": "clipped", "policy/ratio": "ratio"}


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
    """(N,) the log-probability of each completion token after the *student's* prompt, without gradient.

    `teacher` says under whose weights; None: the model's own, as they are. `strategy` is for the model itself, and
    "two_phase", which only bounds the memory of a backward, is "auto" here. Raises what `run` raises.
    """
    plan = replace(plan, teacher=())
    if teacher is not None and not teacher.shares_weights:
        with teacher.weights(model) as module:
            return _logprobs(module, plan, temperature, "auto", verify)
    return _logprobs(model, plan, temperature, "auto" if strategy == "two_phase" else strategy, verify)


def _logprobs(model: nn.Module, plan: Plan, temperature: float, strategy: Strategy, verify: Verify) -> Tensor:
    hidden = run(model, plan, strategy=strategy, verify=verify).student_hidden
    head = head_of(model)
    hidden = head.states(hidden)
    found = linear_logprobs(hidden, head.weight, plan.target_ids, head=head.transform, temperature=temperature)
    return cast(Tensor, found.logprobs)  # None only without targets


def policy_gradient_step(
    model: nn.Module,
    plan: Plan,
    policy: PolicyTerm,
    *,
    reference: Teacher | None = None,
    kl_estimator: KLEstimator = "k3",
    micro_batch: int | None = None,
    strategy: Strategy = "auto",
    verify: Verify = "once",
    backward: Backward | None = Tensor.backward,
) -> StepOutput:
    """Make more likely what was better than its group: the clipped policy gradient, with an anchor if it has one.

    Args:
        model, plan, micro_batch, strategy, verify, backward: as in `distill_step`.
        policy: advantages, bounds, weights and normalizer of the tokens; its `distillation_weight` must be 0.
        reference: whose weights `policy.kl_anchor` holds on to; None where `policy.reference_logprobs` are given, or
            there is no anchor.
        kl_estimator: "k3" of the sampled token, or "exact" of the full distributions; see `losses.policy_gradient`.

    Accumulates gradients of the weighted mean. Raises `ArgumentError` and `PlanError` before any pass.
    """
    policy = checked_policy(plan, policy)
    if policy.distillation_weight != 0:
        raise ArgumentError(
            f"policy must have distillation_weight 0, got {policy.distillation_weight}: mixtures are distill_step's"
        )
    if kl_estimator not in get_args(KLEstimator):
        raise ArgumentError(f"kl_estimator must be 'k3' or 'exact', got {kl_estimator!r}")
    if policy.kl_anchor and (reference is None) == (policy.reference_logprobs is None):
        raise ArgumentError("either reference or policy.reference_logprobs must be given for a kl_anchor, one of them")
    if policy.kl_anchor and (reference is not None or kl_estimator == "exact"):
        reference = require_own_weights(reference)
    divergence = None
    plan = replace(plan, teacher=())
    if policy.kl_anchor and kl_estimator == "exact":
        # The reference reads what the student reads.
        plan = replace(plan, teacher=plan.student)
        divergence = Divergence(
            FusedLinearDivergence(temperature=policy.temperature), policy.token_weights, policy.total, policy.kl_anchor
        )
    elif policy.kl_anchor and reference is not None:
        logprobs = token_logprobs(model, plan, teacher=reference, temperature=policy.temperature, verify=verify)
        policy = replace(policy, reference_logprobs=logprobs)
    passed = passes(
        model,
        plan,
        teacher=reference if divergence else None,
        strategy=strategy,
        micro_batch=micro_batch,
        verify=verify,
        whole=backward is None,
    )
    loss, seen = run_parts(model, plan, passed, divergence=divergence, term=policy, backward=backward)
    if divergence is None:
        seen.values["per_token"] = seen.values["policy"]
    else:
        # With the divergence came its values, which are those of the anchor here.
        for name, anchor in (("reference_logprobs", "teacher_logprobs"), ("reference_entropy", "teacher_entropy")):
            seen.values[name] = seen.values.pop(anchor)
        weights = 1.0 if policy.token_weights is None else policy.token_weights
        seen.values["anchor"] = (seen.values["per_token"] / weights).nan_to_num(nan=0.0)
        seen.values["per_token"] = seen.values["policy"] + policy.kl_anchor * seen.values["per_token"]
    metrics = seen.metrics(policy.token_weights, MEANS | POLICY_MEANS) | {"loss/policy": loss}
    return StepOutput(loss, metrics, passed.report, seen.values)


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
    strategy: Strategy = "auto",
    verify: Verify = "once",
    backward: Backward = Tensor.backward,
) -> StepOutput:
    """Bring the student to the reference tilted by the reward, `p* ∝ p_ref·exp(inv_temperature·reward)`.

    Args:
        model, plan, micro_batch, strategy, verify, backward: as in `distill_step`.
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
    sizes = [len(tree.rows) for tree in plan.student]
    lengths = [rows for tree in plan.student for rows in tree.rows]
    check_tilt_step(plan, rewards, len(lengths), reference, reference_logprobs, completion_mask, normalizer)
    student_logprobs = checked_rows("student_logprobs", plan, student_logprobs)
    reference_logprobs = checked_rows("reference_logprobs", plan, reference_logprobs)
    mask = None if completion_mask is None else completion_mask.to(plan.device).float()
    active = per_completion(torch.ones(plan.num_rows, device=plan.device) if mask is None else mask, lengths) > 0

    def loss_of(logprobs: Tensor, reference: Tensor) -> TiltOutput:
        """From log-probabilities of whole completions, (S,)."""
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
    plan = replace(plan, teacher=())
    if reference_logprobs is None:
        reference_logprobs = token_logprobs(
            model, plan, teacher=require_own_weights(reference), temperature=temperature, verify=verify
        )
    passed = passes(model, plan, strategy=strategy, micro_batch=micro_batch, verify=verify)
    in_parts = passed.report.student.strategy == "two_phase"
    reused = in_parts and student_logprobs is not None
    if in_parts and student_logprobs is None:
        student_logprobs = token_logprobs(model, plan, temperature=temperature, verify=verify)
    term = _TiltTerm(loss_of, lengths, reference_logprobs, mask, temperature)
    if in_parts and student_logprobs is not None:
        term.look_ahead(student_logprobs)
    _, seen = run_parts(model, plan, passed, term=term, backward=backward)
    out = cast(TiltOutput, term.out)
    used, log_ratios = out.used.float(), per_completion(seen.values["per_token"], lengths)
    count = used.sum().clamp(min=1)
    gap = (out.gap * used).sum() / count
    metrics = seen.metrics(mask, MEANS) | {
        "tilt/gap": gap,
        "tilt/gap_std": (((out.gap - gap).square() * used).sum() / count).sqrt(),
        "tilt/reference_kl": (log_ratios * used).sum() / count,
        "tilt/completions": used.sum(),
        "tilt/reused_logprobs": torch.tensor(float(reused), device=plan.device),
    }
    return StepOutput(out.loss.detach(), metrics, passed.report, seen.values)


@dataclass(eq=False)
class _TiltTerm:
    """The tilt's loss as a term of a step: of all rows at once, or of parts, with derivatives known ahead."""

    loss_of: Callable[[Tensor, Tensor], TiltOutput]
    lengths: list[int]
    reference_logprobs: Tensor  # (N,)
    token_weights: Tensor | None  # (N,) 0 and 1
    temperature: float
    out: TiltOutput | None = None
    coefficients: Tensor | None = None  # (N,)

    def look_ahead(self, logprobs: Tensor) -> None:
        """Take the derivatives from these (N,) log-probabilities."""
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
        """(S,) of whole completions."""
        if self.token_weights is not None:
            logprobs = torch.where(self.token_weights != 0, logprobs, 0.0)
        return per_completion(logprobs, self.lengths)
