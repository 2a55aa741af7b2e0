"""Does reinforcement learning as distillation: the teacher is the reference, tilted by the reward.

    p*(y | x) = p_ref(y | x) · exp(β r(y)) / Z(x)              β is `inv_temperature`

`Tilted` is this teacher over whole responses, `TokenTilt` the same idea at each token of any other teacher.

With `d = log π - log p_ref - β r`, the reverse KL to p* is `E_π[d] + log Z`, and the loss of a group is a square,
`½ mean (d_i + log Ẑ)²`: zero at p*, where d is -log Z everywhere. The ways to estimate log Z differ in what they learn,
from the student's own samples and from others' (off-policy):

| `logz`          | log Ẑ of completion i                     | fixed point on its own samples | off-policy       |
|-----------------|-------------------------------------------|--------------------------------|------------------|
| `group_var`     | -mean of d: `½ Σ (d_i - d̄)²/(G-1)`        | p*                             | p*               |
| `leave_one_out` | -mean of the others' d                    | p*, by the same gradient       | p*               |
| `exact`         | given, for what can be enumerated         | p*                             | p*               |
| `reference_lme` | log mean exp β r, samples of p_ref        | p*                             | off by its error |
| `mean_reward`   | β · mean of r, the own one included       | tilted by β(1 - 1/G), not p*   | not p*           |

The gradient of the first two is the policy gradient with the mean of the others as its baseline. Without samples of the
reference, `reference_lme` weights the group's own with p_ref/π. Self-normalised weights (in `reproduce/tilt.py`, an
estimate of the forward KL) have p* as their fixed point on the student's own samples, corrected by p_ref/π, since there
all weights are equal; on a group of 8 of p_ref's samples they do not.

What differs from the obvious: rewards are never standardised here, since β then would mean nothing.

Not covered: values per token; the token tilt of a Jensen-Shannon divergence or of a top-k support, which are not of the
form divergence + log-probability.

Letters: S completions of B groups, G of a group, N tokens. Sources: VarGrad and REBEL arXiv:2404.16767; log-mean-exp
under the reference: A*-PO arXiv:2505.20686.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from .token_weighting import per_completion, spread

# With alpha 0, rounding errors are multiplied by up to exp(-exponent).
LEAST_EXPONENT = -10.0
LogZ: TypeAlias = Literal["group_var", "leave_one_out", "reference_lme", "exact", "mean_reward"]


class TiltOutput(NamedTuple):
    """Is what `Tilted.loss` returns; only the loss is in the graph."""

    loss: Tensor  # (): Σ over groups / normalizer
    coefficients: Tensor  # (S,) its derivative with respect to each completion's log-probability
    gap: Tensor  # (S,) d, which is -log Z everywhere at p*; 0 where a completion is left out
    used: Tensor  # (S,) bool: which completions have a part in it


@dataclass(frozen=True, kw_only=True)
class Tilted:
    """Tilts the reference by the reward, over whole responses. Raises `ArgumentError`.

    `inv_temperature` is β > 0: the inverse of the KL coefficient of KL-regularised reinforcement learning, whose
    objective `E r - KL(π‖p_ref)/β` p* maximises. `logz`: see the module.
    """

    inv_temperature: float
    logz: LogZ = "group_var"

    def __post_init__(self) -> None:
        if not 0.0 < self.inv_temperature < float("inf"):
            raise ArgumentError(f"inv_temperature must be positive, got {self.inv_temperature}")
        if self.logz not in get_args(LogZ):
            raise ArgumentError(f"logz must be one of {', '.join(map(repr, get_args(LogZ)))}, got {self.logz!r}")

    def num_groups(self, sizes: Sequence[int], active: Tensor, *, reference_rewards: object = None) -> float:
        """Counts the groups that have a loss, by which the losses' sum is divided. Counts of a step's parts add up."""
        used = self._used(sizes, active, reference_rewards is not None)
        return float((per_completion(used.float(), sizes) > 0).sum())

    def loss(
        self,
        logprobs: Tensor,
        reference_logprobs: Tensor,
        rewards: Tensor,
        sizes: Sequence[int],
        *,
        active: Tensor | None = None,
        log_z: Tensor | None = None,
        reference_rewards: Tensor | None = None,
        normalizer: float | None = None,
    ) -> TiltOutput:
        """Returns the mean over the groups of each one's loss.

        Args:
            logprobs: (S,) of whole completions, sums over their tokens, under the student; may be in a graph.
            reference_logprobs: (S,) the same under p_ref.
            rewards: (S,); of completions that are not active any number, NaN too.
            sizes: B group sizes, of sum S.
            active: (S,) bool, completions that were judged and have tokens; None: all. A group with fewer than two has
                no loss (with fewer than one, where log Z comes from elsewhere).
            log_z: (B,) for `exact`.
            reference_rewards: (B, M) for `reference_lme`: rewards of M samples of p_ref.
            normalizer: what the sum over the groups is divided by; None: `num_groups`.
        """
        for name, values in (("logprobs", logprobs), ("reference_logprobs", reference_logprobs), ("rewards", rewards)):
            if values.shape != (sum(sizes),):
                raise ArgumentError(f"{name} must have shape (S={sum(sizes)},), got {tuple(values.shape)}")
        if (log_z is None) == (self.logz == "exact"):
            raise ArgumentError(f"log_z must be given for logz='exact', and only there; logz is {self.logz!r}")
        if reference_rewards is not None and self.logz != "reference_lme":
            raise ArgumentError(f"reference_rewards are for logz='reference_lme', got logz={self.logz!r}")
        active = torch.ones_like(rewards, dtype=torch.bool) if active is None else active
        used = self._used(sizes, active, reference_rewards is not None)
        if bool((used & ~rewards.isfinite()).any()):
            raise ArgumentError("rewards must be finite where a completion is active")
        rewards = torch.where(used, rewards, 0.0).to(logprobs.dtype)
        gap = torch.where(used, logprobs - reference_logprobs, 0.0) - self.inv_temperature * rewards
        counts = per_completion(used.to(gap.dtype), sizes)  # (B,)
        estimate = self._log_z(gap.detach(), rewards, used, counts, sizes, log_z, reference_rewards)  # (S,)
        residual = torch.where(used, gap + estimate, 0.0)
        scale = 1 / spread((counts - 1 if self.logz == "group_var" else counts).clamp(min=1), sizes)
        groups = float((counts > 0).sum())
        scale = scale / (groups if normalizer is None else normalizer or 1.0) if groups else scale
        loss = (0.5 * residual.square() * scale).sum()
        return TiltOutput(loss, (residual * scale).detach(), gap.detach(), used)

    def _used(self, sizes: Sequence[int], active: Tensor, has_reference_rewards: bool) -> Tensor:
        alone = self.logz == "exact" or has_reference_rewards
        counts = per_completion(active.float(), sizes)
        return active & (spread(counts, sizes) >= (1 if alone else 2))

    def _log_z(
        self,
        gap: Tensor,
        rewards: Tensor,
        used: Tensor,
        counts: Tensor,
        sizes: Sequence[int],
        log_z: Tensor | None,
        reference_rewards: Tensor | None,
    ) -> Tensor:
        """Estimates (S,) log Ẑ of each completion from the values of its group, 0 where it is not used."""
        if self.logz == "group_var":
            return spread(-per_completion(gap, sizes) / counts.clamp(min=1), sizes)
        if self.logz == "leave_one_out":
            others = spread(per_completion(gap, sizes), sizes) - gap
            return -others / spread((counts - 1).clamp(min=1), sizes)
        if self.logz == "mean_reward":
            return spread(self.inv_temperature * per_completion(rewards, sizes) / counts.clamp(min=1), sizes)
        if log_z is not None:
            return spread(log_z.to(gap), sizes)
        if reference_rewards is not None:
            if reference_rewards.dim() != 2 or len(reference_rewards) != len(sizes):
                raise ArgumentError(
                    f"reference_rewards must have shape (B={len(sizes)}, M), got {tuple(reference_rewards.shape)}"
                )
            return spread(_log_mean_exp(self.inv_temperature * reference_rewards.to(gap)), sizes)
        # p_ref/π · exp(β r) is exp(-d).
        groups = [-own[keep] for own, keep in zip(gap.split(list(sizes)), used.split(list(sizes)), strict=True)]
        means = [_log_mean_exp(group) if len(group) else group.sum() for group in groups]
        return spread(torch.stack(means), sizes)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTilt:
    """Makes the sampled token y more or less likely under each token's teacher q: `q'(a) ∝ q(a)·exp(b·1[a = y])`.

    `exponents` (N,) is b: `inv_temperature` times the advantage of the token, or of its completion. Raises
    `ArgumentError` for another shape or type; for what divergences it is exact, see `per_token`.
    """

    exponents: Tensor

    def __post_init__(self) -> None:
        if self.exponents.dim() != 1 or not self.exponents.is_floating_point():
            raise ArgumentError(
                f"exponents must be floats of shape (N,), got {self.exponents.dtype} {tuple(self.exponents.shape)}"
            )
        if not bool(self.exponents.isfinite().all()):
            raise ArgumentError("exponents must be finite")

    @staticmethod
    def per_token(
        exponents: Tensor, divergence: Tensor, student_logprobs: Tensor, teacher_logprobs: Tensor, *, alpha: float
    ) -> Tensor:
        """Turns the divergence to q, and the log-probabilities of y, into the divergence to q', all (n,); in the graph.

        With `Z = 1 + q_y (e^b - 1)`, of full distributions:

            KL(q'‖p) = KL(q‖p)/Z + q_y (e^b - 1)/Z · (log q_y - log p_y) + b q'_y - log Z       (alpha 0)
            KL(p‖q') = KL(p‖q) - b p_y + log Z                                                  (alpha 1)

        With alpha 0 the first two terms cancel where q is sure of a token that is tilted away: errors grow as 1/Z, at
        most e^-b, which is why exponents of less than `LEAST_EXPONENT` are refused there.
        """
        log_q = teacher_logprobs.detach()
        # log(1 - q_y), -inf where q_y is 1.
        log_z = torch.logaddexp((-torch.expm1(log_q)).log(), exponents + log_q)
        if alpha == 1.0:
            return divergence - exponents * student_logprobs.exp() + log_z
        # q_y (e^b - 1)/Z, without an overflow where b is large or a cancellation where it is small.
        moved = (log_q - log_z + exponents.clamp(min=0)).exp() * exponents.sign() * -torch.expm1(-exponents.abs())
        tilted = (log_q + exponents - log_z).exp()
        return divergence * (-log_z).exp() + moved * (log_q - student_logprobs) + exponents * tilted - log_z


def _log_mean_exp(values: Tensor) -> Tensor:
    """Computes log mean exp over the last dimension."""
    return values.logsumexp(-1) - math.log(values.shape[-1])
