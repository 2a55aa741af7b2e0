"""Checks what a step is given before any pass: every `ArgumentError` about rows, weights and targets is raised here.

Each check returns the argument as the step uses it, on the plan's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels import TopKLogprobs

from ..errors import ArgumentError
from ..losses import FusedLinearDivergence
from ..losses.policy_gradient import PolicyTerm
from ..losses.tilt import LEAST_EXPONENT, TokenTilt
from ..prefix.planner import Plan
from ..teachers import Teacher


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
    if not isinstance(rows, Tensor) or rows.shape != (plan.num_rows,) or not rows.is_floating_point():
        came = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ArgumentError(f"{name} must be a float tensor of shape (N={plan.num_rows},), got {came}")
    return rows.to(plan.device)


def checked_scores(plan: Plan, scored: TopKLogprobs) -> TopKLogprobs:
    """A teacher's top-k log-probabilities, one row of them a row of the plan, on its device."""
    shapes = tuple(scored.ids.shape), tuple(scored.logprobs.shape)
    if len(shapes[0]) != 2 or shapes[0] != shapes[1] or shapes[0][0] != plan.num_rows:
        raise ArgumentError(
            f"teacher must have ids and logprobs of one shape (N={plan.num_rows}, K), got {shapes[0]} and {shapes[1]}"
        )
    return TopKLogprobs(scored.ids.to(plan.device), scored.logprobs.to(plan.device))


def total_of(plan: Plan, weights: Tensor | None, normalizer: float | None) -> float:
    """What a weighted sum over the rows is divided by, never 0."""
    if normalizer is None:
        return float(plan.num_rows if weights is None else weights.sum()) or 1.0
    if not 0 <= normalizer < float("inf"):
        raise ArgumentError(f"normalizer must be finite and at least 0, got {normalizer}")
    return normalizer or 1.0


def checked_tilt(plan: Plan, tilt: TokenTilt, loss: FusedLinearDivergence) -> TokenTilt:
    if len(tilt.exponents) != plan.num_rows:
        raise ArgumentError(f"tilt must have exponents of shape (N={plan.num_rows},), got {len(tilt.exponents)}")
    options = loss.options
    if options["alpha"] not in (0.0, 1.0) or any(options[name] is not None for name in ("support", "entry_clip")):
        raise ArgumentError(
            "loss must have alpha 0 or 1, the full vocabulary and no entry_clip where there is a tilt, got "
            f"{loss.extra_repr()}"
        )
    if loss.importance_clip is not None:
        raise ArgumentError(f"loss must have no importance_clip where there is a tilt, got {loss.importance_clip}")
    if options["alpha"] == 0.0 and bool((tilt.exponents < LEAST_EXPONENT).any()):
        raise ArgumentError(
            f"tilt must have exponents of at least {LEAST_EXPONENT:g} for a loss of alpha 0, which would multiply its "
            f"rounding errors, got {float(tilt.exponents.min()):g}"
        )
    return TokenTilt(exponents=tilt.exponents.to(plan.device))


def check_tilt_step(
    plan: Plan,
    rewards: object,
    completions: int,
    reference: Teacher | None,
    reference_logprobs: Tensor | None,
    completion_mask: Tensor | None,
    normalizer: float | None,
) -> None:
    if not isinstance(rewards, Tensor) or rewards.shape != (completions,) or not rewards.is_floating_point():
        came = f"{rewards.dtype} {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ArgumentError(f"rewards must be a float tensor of shape (S={completions},), got {came}")
    if (reference is None) == (reference_logprobs is None):
        raise ArgumentError("either reference or reference_logprobs must be given, one of them")
    if reference is not None:
        require_own_weights(reference)
    mask = completion_mask
    if mask is not None and (mask.shape != (plan.num_rows,) or mask.dtype != torch.bool):
        raise ArgumentError(
            f"completion_mask must be bool of shape (N={plan.num_rows},), got {mask.dtype} {tuple(mask.shape)}"
        )
    if normalizer is not None and not 0 <= normalizer < float("inf"):
        raise ArgumentError(f"normalizer must be finite and at least 0, got {normalizer}")


def require_own_weights(reference: Teacher | None) -> Teacher:
    if reference is None or not hasattr(reference, "weights") or reference.shares_weights:
        raise ArgumentError(
            "reference must be a teacher with weights of its own, such as AdapterOff() or Frozen(...), got "
            f"{type(reference).__name__}"
        )
    return reference


def checked_policy(plan: Plan, policy: PolicyTerm) -> PolicyTerm:
    """On the plan's device. Raises `ArgumentError` for one of other tokens."""
    if len(policy.advantages) != plan.num_rows:
        raise ArgumentError(f"policy must have advantages of shape (N={plan.num_rows},), got {len(policy.advantages)}")
    return policy.to(plan.device)
