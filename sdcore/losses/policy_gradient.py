"""Computes the policy gradient: as a baseline, as a part of a mixture with distillation, and with an anchor.

    advantages = group_advantages(rewards, sizes)                            # (S,)
    term = PolicyTerm(advantages=spread(advantages, lengths), old_logprobs=old)   # (N,)
    policy_gradient_step(model, plan, term);  distill_step(model, plan, policy=replace(term, distillation_weight=0.5))

The loss of a token is `-min(ratio·A, clip(ratio, 1 - clip_low, 1 + clip_high)·A)` with `ratio = π(y)/π_old(y)` (PPO,
arXiv:1707.06347, eq. 7), plus `kl_anchor` times a KL to a reference.

What differs from the obvious: without `old_logprobs` the ratio is 1 with a gradient, which is REINFORCE. The anchor
"k3" is GRPO's, `p_ref/π - 1 - log(p_ref/π)` of the sampled token (arXiv:2402.03300, eq. 4): its value estimates
KL(π‖p_ref), but its gradient, on the student's own samples, is that of KL(p_ref‖π). "exact" is KL(π‖p_ref) of the full
distributions, value and gradient, and costs a projection of the reference's states.

With `completion_of` the ratio is one of whole completions, `exp(mean(log π(y) - log π_old(y)))` over the tokens that
have a weight (GSPO, arXiv:2507.18071, eq. 7), and each token's loss has it.

Not covered: value functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from .token_weighting import per_completion, spread

Estimator: TypeAlias = Literal["grpo", "dr_grpo", "leave_one_out"]
KLEstimator: TypeAlias = Literal["k3", "exact"]
# Added to a group's standard deviation, as TRL does: rewards that differ by rounding are not blown up.
LEAST_STD = 1e-4


class PolicyLoss(NamedTuple):
    """Holds values of each token, (n,)."""

    per_token: Tensor  # in the graph, before weights
    ratio: Tensor  # π/π_old, detached
    clipped: Tensor  # bool: no gradient of the reward, because the ratio has left its bounds
    anchor: Tensor  # the k3 estimate, detached; 0 without reference


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyTerm:
    """Says what a step needs to know of rewards, for N tokens as in `plan.target_ids`. Raises `ArgumentError`."""

    advantages: Tensor  # (N,)
    old_logprobs: Tensor | None = None  # (N,) of the policy that sampled; None: the student as it is
    clip_low: float | None = 0.2  # None: not clipped on this side
    clip_high: float | None = 0.2
    token_weights: Tensor | None = None  # (N,); None: all 1
    normalizer: float | None = None  # what the weighted sum is divided by; None: the sum of the weights
    kl_anchor: float = 0.0  # weight of the KL to the reference
    reference_logprobs: Tensor | None = None  # (N,) for the k3 anchor; None: no anchor, or the step computes them
    temperature: float = 1.0  # at which the completions were sampled; divides the logits
    distillation_weight: float = 0.0  # in `distill_step`: that share of the loss is the divergence, the rest this
    completion_of: Tensor | None = None  # (N,) int64, which completion a token is of: ratios are of completions (GSPO)

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ArgumentError(f"{name} must be positive or None, got {bound}")
        if not 0.0 <= self.distillation_weight <= 1.0:
            raise ArgumentError(f"distillation_weight must be in [0, 1], got {self.distillation_weight}")
        if not self.kl_anchor >= 0:
            raise ArgumentError(f"kl_anchor must be at least 0, got {self.kl_anchor}")
        if self.normalizer is not None and not 0 <= self.normalizer < float("inf"):
            raise ArgumentError(f"normalizer must be finite and at least 0, got {self.normalizer}")
        count = self.advantages.shape
        for name in ROWS:
            rows = getattr(self, name)
            if rows is not None and (rows.dim() != 1 or rows.shape != count or not rows.is_floating_point()):
                raise ArgumentError(
                    f"{name} must be floats of shape (N,) as advantages, {tuple(count)}, got {rows.dtype} "
                    f"{tuple(rows.shape)}"
                )
        weights = torch.ones(()) if self.token_weights is None else self.token_weights
        used = weights != 0
        if not bool((self.advantages.isfinite() | ~used).all() & weights.isfinite().all()):
            raise ArgumentError("advantages must be finite where a token has a weight, and so must token_weights")
        owner = self.completion_of
        if owner is not None and (owner.shape != count or owner.dtype != torch.int64 or bool((owner < 0).any())):
            raise ArgumentError(
                f"completion_of must be int64 of shape (N,) as advantages, {tuple(count)}, and at least 0, got "
                f"{owner.dtype} {tuple(owner.shape)}"
            )

    def to(self, device: torch.device) -> PolicyTerm:
        names = (*ROWS, "completion_of")
        moved = {name: getattr(self, name).to(device) for name in names if getattr(self, name) is not None}
        return replace(self, **moved)

    @property
    def total(self) -> float:
        """Returns what the weighted sum is divided by."""
        if self.normalizer is not None:
            return self.normalizer or 1.0
        weights = self.token_weights
        return float(len(self.advantages) if weights is None else weights.sum()) or 1.0

    def scalar(self, rows: Tensor | slice, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns these rows' part () of the loss, in the graph, of their (n,) log-probabilities, and values to report.

        With `completion_of` they must be all rows with a weight of each completion, as a step's parts are.
        """
        reference = self.reference_logprobs if self.kl_anchor else None
        out = policy_loss(
            logprobs,
            self.advantages[rows],
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs[rows],
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            reference_logprobs=None if reference is None else reference[rows],
            kl_anchor=self.kl_anchor,
            completion_of=None if self.completion_of is None else self.completion_of[rows],
        )
        weighted = out.per_token if self.token_weights is None else self.token_weights[rows] * out.per_token
        values = {"policy": weighted, "ratio": out.ratio, "clipped": out.clipped.to(out.ratio.dtype)}
        if reference is not None:
            values |= {"anchor": out.anchor, "reference_logprobs": reference[rows]}
        return weighted.sum() / self.total, values


ROWS = ("advantages", "old_logprobs", "token_weights", "reference_logprobs")


def group_advantages(
    rewards: Tensor, sizes: Sequence[int], *, estimator: Estimator = "grpo", active: Tensor | None = None
) -> Tensor:
    """Computes (S,) how much better than its group each completion is.

    `grpo`: (r - mean)/(std + 1e-4), std with G - 1 (arXiv:2402.03300). `dr_grpo`: r - mean, without the std, which
    makes easy and hard questions count more (arXiv:2503.20783). `leave_one_out`: r - mean of the others, unbiased
    (RLOO, arXiv:2402.14740). `active` (S,) bool: completions that were judged; the others have no part in it and get 0,
    as does a group with fewer than two. Raises `ArgumentError`.
    """
    if estimator not in get_args(Estimator):
        raise ArgumentError(f"estimator must be one of {', '.join(map(repr, get_args(Estimator)))}, got {estimator!r}")
    active = torch.ones_like(rewards, dtype=torch.bool) if active is None else active
    if bool((active & ~rewards.isfinite()).any()):
        raise ArgumentError("rewards must be finite where a completion is active")
    rewards = torch.where(active, rewards, 0.0)
    counts = per_completion(active.to(rewards.dtype), sizes)
    mean = spread(per_completion(rewards, sizes) / counts.clamp(min=1), sizes)
    centred = torch.where(active & (spread(counts, sizes) > 1), rewards - mean, 0.0)
    if estimator == "dr_grpo":
        return centred
    if estimator == "leave_one_out":
        return centred * spread(counts / (counts - 1).clamp(min=1), sizes)
    deviation = (per_completion(centred.square(), sizes) / (counts - 1).clamp(min=1)).sqrt()
    return centred / (spread(deviation, sizes) + LEAST_STD)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    reference_logprobs: Tensor | None = None,
    kl_anchor: float = 0.0,
    completion_of: Tensor | None = None,
) -> PolicyLoss:
    """Computes the clipped policy gradient of n tokens, all arguments (n,); `logprobs` in the graph.

    `completion_of` int64: the ratio is that of the completion that a token is of, of which these are all tokens.
    """
    log_ratio = logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)
    if completion_of is not None:
        log_ratio = _means(log_ratio, completion_of)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(
        min=None if clip_low is None else 1 - clip_low, max=float("inf") if clip_high is None else 1 + clip_high
    )
    per_token = -torch.minimum(ratio * advantages, bounded * advantages)
    clipped = (bounded != ratio) & (bounded * advantages < ratio * advantages)
    anchor = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        to_reference = reference_logprobs - logprobs
        anchor = torch.expm1(to_reference) - to_reference
        per_token = per_token + kl_anchor * anchor
    return PolicyLoss(per_token, ratio.detach(), clipped.detach(), anchor.detach())


def _means(rows: Tensor, owner: Tensor) -> Tensor:
    """Gives each of the rows (n,) the mean of its completion's; in the graph."""
    count = int(owner.max()) + 1 if len(owner) else 0
    sums = rows.new_zeros(count).index_add(0, owner, rows)
    counts = rows.new_zeros(count).index_add(0, owner, torch.ones_like(rows))
    return (sums / counts.clamp(min=1))[owner]
