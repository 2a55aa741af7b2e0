"""Computes divergences between two short lists of buckets: a top-k support's k ids and the rest of the vocabulary.

A softmax restricted to k ids with one bucket for the remaining mass is again a softmax, over the k logits and the
log-sum-exp of the others. So a gradient with respect to the bucket logits is spread over the vocabulary by giving each
id its own entry and every other token the tail's entry times its share of the tail's mass. Everything here is
(rows, buckets) in float64: the buckets are few, and self-distillation lives on the digits of their log-ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The mass that an empty tail is given. log 0 has no use, and no float32 tile can tell this mass from 0.
LEAST_MASS = 1e-37


def bucket_divergence(student: Tensor, teacher: Tensor, alpha: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """Returns the loss (rows,) and its gradient with respect to the student's bucket logits (rows, buckets).

    `student` and `teacher` are log-probabilities (rows, buckets) in float64. The loss is clamped at 0, below which only
    rounding (1e-16) takes it.
    """
    p, loss, numerators, centre = bucket_terms(student, teacher, alpha, normalize)
    loss = loss.clamp(min=0.0)
    if centre is None:
        return loss, numerators
    return loss, numerators - p * (loss if alpha == 1.0 else centre)[:, None]


def bucket_terms(
    student: Tensor, teacher: Tensor, alpha: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns p (rows, buckets), loss (rows,), numerators (rows, buckets) and centre (rows,).

    The gradient is `numerators - p · centre`. All may be of some of the buckets: losses and centres of others are added
    to them. Each summand carries the difference of the masses beside the textbook term, so that an error in the
    normalisers enters only to second order.
    """
    p, q = student.exp(), teacher.exp()
    u = teacher - student
    if alpha == 0.0:
        return p, (q * u + p - q).sum(-1), p - q, None
    if alpha == 1.0:
        loss = (q - p - p * u).sum(-1)
        return p, loss, -p * u, loss
    scale = 1 / (alpha * (1 - alpha)) if normalize else 1.0
    r = torch.logaddexp(u + math.log(alpha), u.new_tensor(math.log1p(-alpha)))  # log(m/p)
    numerators = -scale * (1 - alpha) * p * r
    # The masses' differences of all buckets add up to 0.
    return p, (scale * alpha * q * (u - r) + numerators).sum(-1), numerators, numerators.sum(-1)


def with_tail(logprobs: Tensor, tail_mass: Tensor | None, tail: bool) -> Tensor:
    """Appends the log of the remaining mass (rows,) to (rows, k) log-probabilities, or renormalises them without it.

    `tail_mass` None takes it as one minus the listed mass, for a teacher of which no more is known.
    """
    if not tail:
        return logprobs - logprobs.logsumexp(-1, keepdim=True)
    if tail_mass is None:
        tail_mass = -torch.expm1(logprobs.logsumexp(-1))
    return torch.cat([logprobs, tail_mass.clamp(min=LEAST_MASS).log()[:, None]], dim=-1)


def tail_share(gradient: Tensor, tail_mass: Tensor) -> Tensor:
    """Returns what -p of a token in the tail is multiplied by, (rows,), given the tail's gradient and its mass."""
    return -gradient / tail_mass.clamp(min=LEAST_MASS).to(gradient)
