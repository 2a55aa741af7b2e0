"""Checks what a step is given before any pass: every `ArgumentError` about rows, weights and targets is raised here.

A function `checked_...` returns the argument as the step uses it, on the plan's device. They stand in the order in
which the steps call them: first those of `distill`, then those of `rewards`.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from sdkernels import TopKLogprobs

from ..errors import ArgumentError
from ..losses import FusedLinearDivergence
from ..losses.policy_gradient import KLEstimator, PolicyTerm
from ..losses.tilt import LEAST_EXPONENT, TokenTilt
from ..prefix.planner import Plan
from ..teachers import Teacher
from ..teachers.weights import checked_teacher


def checked_weights(plan: Plan, token_weights: Tensor | None) -> Tensor | None:
    weights = checked_rows("token_weights", plan, token_weights)
    if weights is not None and not bool(weights.isfinite().all() & ((weights.sum() > 0) | (weights == 0).all())):
        raise ArgumentError(
            f"token_weights must be finite, and all 0 or of a positive sum, got {float(weights.sum()):g}"
        )
    return weights


def checked_rows(name: str, plan: Plan, rows: Tensor | None) -> Tensor | None:
    if rows is None:
        return None
    _require_floats(name, rows, "N", plan.num_rows)
    return rows.to(plan.device)


def checked_scores(plan: Plan, scored: TopKLogprobs) -> TopKLogprobs:
    """Returns a teacher's top-k log-probabilities, which must have a row for each row of the plan."""
    shapes = tuple(scored.ids.shape), tuple(scored.logprobs.shape)
    if len(shapes[0]) != 2 or shapes[0] != shapes[1] or shapes[0][0] != plan.num_rows:
        raise ArgumentError(
            f"teacher must have ids and logprobs of one shape (N={plan.num_rows}, K), got {shapes[0]} and {shapes[1]}"
        )
    return TopKLogprobs(scored.ids.to(plan.device), scored.logprobs.to(plan.device))


def require_teacher_prompts(plan: Plan) -> None:
    if not plan.teachers:
        raise ArgumentError("plan must have teacher prompts or views, got a plan of the student's pass alone")


def scored_weights(plan: Plan, weights: Tensor | None) -> Tensor | None:
    """Takes the weight of rows that no view scores: they carry no loss."""
    if plan.scored is None:
        return weights
    return plan.scored.float() if weights is None else torch.where(plan.scored, weights, 0.0)


def checked_tilt(plan: Plan, tilt: TokenTilt, loss: FusedLinearDivergence, scored: TopKLogprobs | None) -> TokenTilt:
    """Refuses a tilt for which `TokenTilt.per_token` would not be exact."""
    if scored is not None:
        raise ArgumentError("tilt needs the teacher's full distribution, got TopKLogprobs as the teacher")
    if len(tilt.exponents) != plan.num_rows:
        raise ArgumentError(f"tilt must have exponents of shape (N={plan.num_rows},), got {len(tilt.exponents)}")
    options = loss.options
    if options.alpha not in (0.0, 1.0) or options.support is not None or options.entry_clip is not None:
        raise ArgumentError(
            "loss must have alpha 0 or 1, the full vocabulary and no entry_clip where there is a tilt, got "
            f"{loss.extra_repr()}"
        )
    if loss.importance_clip is not None:
        raise ArgumentError(f"loss must have no importance_clip where there is a tilt, got {loss.importance_clip}")
    if options.alpha == 0.0 and bool((tilt.exponents < LEAST_EXPONENT).any()):
        raise ArgumentError(
            f"tilt must have exponents of at least {LEAST_EXPONENT:g} for a loss of alpha 0, which would multiply its "
            f"rounding errors, got {float(tilt.exponents.min()):g}"
        )
    return TokenTilt(exponents=tilt.exponents.to(plan.device))


def checked_mixture(plan: Plan, policy: PolicyTerm) -> PolicyTerm:
    """Returns the policy gradient that goes with a divergence, and must bring what its anchor needs."""
    policy = _checked_policy(plan, policy)
    if policy.kl_anchor and policy.reference_logprobs is None:
        raise ArgumentError("policy must have reference_logprobs for its kl_anchor (see token_logprobs), got None")
    return policy


def total_of(plan: Plan, weights: Tensor | None, normalizer: float | None) -> float:
    """Returns what a weighted sum over the rows is divided by, never 0."""
    if normalizer is None:
        return float(plan.num_rows if weights is None else weights.sum()) or 1.0
    _require_normalizer(normalizer)
    return normalizer or 1.0


def checked_policy(plan: Plan, policy: PolicyTerm, reference: Teacher | None, kl_estimator: KLEstimator) -> PolicyTerm:
    """Returns the policy gradient of a step of its own, whose anchor has either a reference or log-probabilities."""
    policy = _checked_policy(plan, policy)
    if policy.distillation_weight != 0:
        raise ArgumentError(
            f"policy must have distillation_weight 0, got {policy.distillation_weight}: mixtures are distill_step's"
        )
    if kl_estimator not in get_args(KLEstimator):
        raise ArgumentError(f"kl_estimator must be 'k3' or 'exact', got {kl_estimator!r}")
    if policy.kl_anchor and (reference is None) == (policy.reference_logprobs is None):
        raise ArgumentError("either reference or policy.reference_logprobs must be given for a kl_anchor, one of them")
    if policy.kl_anchor and (reference is not None or kl_estimator == "exact"):
        checked_reference(reference)
    return policy


def checked_reference(reference: Teacher | None) -> Teacher:
    if reference is None or checked_teacher("reference", reference).shares_weights:
        raise ArgumentError(
            "reference must be a teacher with weights of its own, such as AdapterOff() or Frozen(...), got "
            f"{type(reference).__name__}"
        )
    return reference


def check_tilt_step(
    plan: Plan,
    rewards: Tensor,
    completions: int,
    reference: Teacher | None,
    reference_logprobs: Tensor | None,
    completion_mask: Tensor | None,
    normalizer: float | None,
) -> None:
    _require_floats("rewards", rewards, "S", completions)
    if (reference is None) == (reference_logprobs is None):
        raise ArgumentError("either reference or reference_logprobs must be given, one of them")
    if reference is not None:
        checked_reference(reference)
    mask = completion_mask
    if mask is not None and (mask.shape != (plan.num_rows,) or mask.dtype != torch.bool):
        raise ArgumentError(
            f"completion_mask must be bool of shape (N={plan.num_rows},), got {mask.dtype} {tuple(mask.shape)}"
        )
    if normalizer is not None:
        _require_normalizer(normalizer)


def _checked_policy(plan: Plan, policy: PolicyTerm) -> PolicyTerm:
    if len(policy.advantages) != plan.num_rows:
        raise ArgumentError(f"policy must have advantages of shape (N={plan.num_rows},), got {len(policy.advantages)}")
    return policy.to(plan.device)


def _require_floats(name: str, values: object, letter: str, count: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (count,) or not values.is_floating_point():
        came = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ArgumentError(f"{name} must be a float tensor of shape ({letter}={count},), got {came}")


def _require_normalizer(normalizer: float) -> None:
    if not 0 <= normalizer < float("inf"):
        raise ArgumentError(f"normalizer must be finite and at least 0, got {normalizer}")
