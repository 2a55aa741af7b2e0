"""Defines every divergence and its gradient: float64, full logits, textbook formulas.

This is the oracle that every backend is tested against, so it shares nothing with them: it imports nothing of ours,
holds all logits at once, and takes tensors and plain scalars. The papers' sums cancel where teacher and student are
near each other, in float64 too, down to values below 0: `divergence` is the same sum in a form without cancellation,
which `textbook_divergence` is held beside. Each gradient is here twice: in closed form (`*_gradient`), and through
autograd of the loss, with `detach` exactly where a definition says "without gradient".

It does not cover speed, memory, low precision (everything is cast to float64) or argument errors.

Dimensions: N rows, H hidden, Ht teacher hidden, V vocabulary, K chosen ids. `log_p` and `log_q` are log-probabilities
over the last axis, of student and teacher; "gradient" always means with respect to the student's final logits.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """Leads from a projection to final logits; see `final_logits`."""

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


IDENTITY = Transform()


class ReferenceOutput(NamedTuple):
    """Holds values per row (N,) in float64, 0 in rows of weight 0; `loss` is () or, with reduction "none", (N,)."""

    loss: Tensor
    per_token: Tensor
    student_logprobs: Tensor | None
    teacher_logprobs: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    active_tokens: int


def final_logits(
    projection: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`softcap·tanh(scale·(projection + bias)/softcap) / temperature`, or `scale·(projection + bias) / temperature`."""
    logits = projection.double()
    if bias is not None:
        logits = logits + bias.double()
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def log_mixture(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """Returns `log m`, `m = (1 - alpha)·p + alpha·q`."""
    return torch.logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))


def contributions(log_p: Tensor, log_q: Tensor, alpha: float, normalize: bool = False) -> Tensor:
    """Returns what each entry adds to the divergence, (…, V); of either sign.

    alpha 0: `q (log q - log p)`; alpha 1: `p (log p - log q)`; between:
    `alpha q (log q - log m) + (1 - alpha) p (log p - log m)`, divided by `alpha (1 - alpha)` with `normalize`.
    An entry without probability adds nothing (`0 · log 0 = 0`).
    """

    def weighted_gap(log_a: Tensor, log_b: Tensor) -> Tensor:  # a (log a - log b)
        a = log_a.exp()
        return torch.where(a > 0, a * (log_a - log_b), 0.0)

    if alpha == 0:
        return weighted_gap(log_q, log_p)
    if alpha == 1:
        return weighted_gap(log_p, log_q)
    log_m = log_mixture(log_p, log_q, alpha)
    entries = alpha * weighted_gap(log_q, log_m) + (1 - alpha) * weighted_gap(log_p, log_m)
    return entries / (alpha * (1 - alpha)) if normalize else entries


def textbook_divergence(log_p: Tensor, log_q: Tensor, alpha: float, normalize: bool = False) -> Tensor:
    """Returns `divergence` as the papers write it, (…): near equality its error exceeds it and it may be negative."""
    return contributions(log_p, log_q, alpha, normalize).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor, alpha: float, normalize: bool = False) -> Tensor:
    """Returns KL(q‖p), KL(p‖q), or the generalised JSD of GKD (arXiv:2306.13649), (…); never negative.

    `KL(a‖b) = Σ a (log a - log b)` is here `Σ a (exp(gap) - 1 - gap)`, `gap = log b - log a`: the terms differ by
    `b - a`, which sums to 0, and none of these is negative, so that none takes digits from another.
    """

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        a, b = log_a.exp(), log_b.exp()
        gap = torch.where(a > 0, log_b - log_a, 0.0)
        small = gap.clamp(-1.0, 1.0)  # expm1 of the others may overflow, and spoil the gradient unseen
        is_small = (a > 0) & (gap.abs() < 1)
        return torch.where(is_small, a * (torch.expm1(small) - small), b - a - a * gap).sum(-1)

    if alpha == 0:
        return kl(log_q, log_p)
    if alpha == 1:
        return kl(log_p, log_q)
    log_m = log_mixture(log_p, log_q, alpha)
    value = alpha * kl(log_q, log_m) + (1 - alpha) * kl(log_p, log_m)
    return value / (alpha * (1 - alpha)) if normalize else value


def divergence_gradient(log_p: Tensor, log_q: Tensor, alpha: float, normalize: bool = False) -> Tensor:
    """Returns the gradient of `divergence`, (…, V)."""
    p, q = log_p.exp(), log_q.exp()
    if alpha == 0:
        return p - q
    log_b = log_q if alpha == 1 else log_mixture(log_p, log_q, alpha)
    gap = torch.where(p > 0, log_p - log_b, 0.0)
    gradient = p * (gap - (p * gap).sum(-1, keepdim=True))
    if alpha == 1:
        return gradient
    return gradient / alpha if normalize else (1 - alpha) * gradient


def clipped_divergence(
    log_p: Tensor, log_q: Tensor, alpha: float, entry_clip: float, normalize: bool = False
) -> Tensor:
    """Adds up the contributions, each at most `entry_clip` (OPSD, arXiv:2601.18734); may be negative."""
    return contributions(log_p, log_q, alpha, normalize).clamp(max=entry_clip).sum(-1)


def clipped_divergence_gradient(
    log_p: Tensor, log_q: Tensor, alpha: float, entry_clip: float, normalize: bool = False
) -> Tensor:
    """Returns the gradient of that: capped entries are constants, the others count with d entry / d log p."""
    p, q = log_p.exp(), log_q.exp()
    if alpha == 0:
        per_entry = -q
    elif alpha == 1:
        per_entry = p * (log_p - log_q + 1)
    else:
        per_entry = (1 - alpha) * p * (log_p - log_mixture(log_p, log_q, alpha))
        per_entry = per_entry / (alpha * (1 - alpha)) if normalize else per_entry
    per_entry = torch.where(contributions(log_p, log_q, alpha, normalize) < entry_clip, per_entry, 0.0)
    return per_entry - p * per_entry.sum(-1, keepdim=True)


def bucketed(logits: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Returns log-probabilities (…, K + 1) of `ids` (…, K) and of the rest; without tail (…, K), renormalised.

    With K = V there are no others, and `tail` must be False.
    """
    chosen = logits.gather(-1, ids)
    if not tail:
        return chosen.log_softmax(-1)
    others = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others], -1) - logits.logsumexp(-1, keepdim=True)


def bucketed_logprobs(logprobs: Tensor, tail: bool) -> Tensor:
    """Does what `bucketed` does for a teacher of which only the K log-probabilities (…, K) are known."""
    if not tail:
        return logprobs.log_softmax(-1)
    rest = torch.log(-torch.expm1(logprobs.logsumexp(-1, keepdim=True).clamp(max=0.0)))
    return torch.cat([logprobs, rest], -1)


def bucketed_gradient(bucket_gradient: Tensor, student_logits: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Spreads the gradient per bucket over the logits (…, V); entries of the tail share theirs by probability."""
    k = ids.shape[-1]
    if not tail:
        return torch.zeros_like(student_logits).scatter(-1, ids, bucket_gradient)
    within_tail = student_logits.scatter(-1, ids, -math.inf).softmax(-1)
    return (bucket_gradient[..., k:] * within_tail).scatter(-1, ids, bucket_gradient[..., :k])


def sampled_divergence(log_p: Tensor, log_q: Tensor, target_ids: Tensor) -> Tensor:
    """Returns `sg(log p(y) - log q(y)) · log p(y)`, (…): the score-function form of KL(p‖q); of either sign."""
    at_p, at_q = at(log_p, target_ids), at(log_q, target_ids)
    return (at_p - at_q).detach() * at_p


def sampled_divergence_gradient(log_p: Tensor, log_q: Tensor, target_ids: Tensor) -> Tensor:
    """Returns `sg(log p(y) - log q(y)) · (onehot(y) - p)`, (…, V)."""
    gap = (at(log_p, target_ids) - at(log_q, target_ids)).unsqueeze(-1)
    return gap * (torch.nn.functional.one_hot(target_ids, log_p.shape[-1]) - log_p.exp())


def importance_weight(log_p_target: Tensor, old_logprobs: Tensor, clip: float) -> Tensor:
    """Returns `min(exp(sg(log p(y) - old_logprob)), clip)`, (…)."""
    return (log_p_target.detach() - old_logprobs).exp().clamp(max=clip)


def at(log_p: Tensor, ids: Tensor) -> Tensor:
    """Returns the log-probability of one id per row, (…)."""
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Returns `-Σ p log p` in nats, (…)."""
    return -(log_p.exp() * log_p).sum(-1)


def entropy_gradient(log_p: Tensor) -> Tensor:
    """Returns `-p ⊙ (log p + entropy)`, (…, V)."""
    return -log_p.exp() * (log_p + entropy(log_p).unsqueeze(-1))


def linear_divergence_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    alpha: float = 1.0,
    normalize: bool = False,
    student: Transform = IDENTITY,
    teacher: Transform = IDENTITY,
    topk: int | None = None,
    topk_of: Literal["student", "teacher"] = "student",
    tail: bool = True,
    sampled: bool = False,
    cached_ids: Tensor | None = None,
    cached_logprobs: Tensor | None = None,
    mix_hidden: Tensor | None = None,
    mix_weight: Tensor | None = None,
    mix_share: float = 0.5,
    token_weights: Tensor | None = None,
    target_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    importance_clip: float = 2.0,
    entry_clip: float | None = None,
    vocab_size: int | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    precision: torch.dtype = torch.float64,
) -> ReferenceOutput:
    """Does `linear_divergence` on full float64 logits, with a graph to student_hidden, student_weight, student.bias.

    Hidden states are (N, H) and (N, Ht), weights (V, H) and (V, Ht), `teacher_weight` None for the student's;
    `cached_ids` and `cached_logprobs` (N, K) stand in for the teacher's hidden states; `mix_*` is the second teacher
    of a trust region. To get float64 gradients, pass float64 leaves: those of other dtypes are rounded to them.
    With `precision` float32 this is the naive path that errors are held against: logits in the dtype of the inputs,
    then float32 and textbook sums, as a model's own forward pass and a loss written with `log_softmax` have them.
    """
    if teacher_weight is None:
        teacher_weight = student_weight
    rows = torch.arange(student_hidden.shape[0], device=student_hidden.device)
    weights = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    if token_weights is not None:
        rows, weights = (token_weights != 0).nonzero().squeeze(-1), token_weights.double()

    def logits_of(hidden: Tensor, weight: Tensor, transform: Transform) -> Tensor:
        bias = None if transform.bias is None else transform.bias[:vocab_size]
        hidden, weight = hidden[rows], weight[:vocab_size]
        if precision == torch.float64:
            hidden, weight = hidden.double(), weight.double()
        return final_logits(hidden @ weight.T, bias, *transform[1:]).to(precision)

    student_logits = logits_of(student_hidden, student_weight, student)
    log_p = student_logits.log_softmax(-1)
    teacher_logits = log_q = None
    if teacher_hidden is not None:
        with torch.no_grad():
            teacher_logits = logits_of(teacher_hidden, teacher_weight, teacher)
            if mix_hidden is not None:
                second = logits_of(mix_hidden, teacher_weight if mix_weight is None else mix_weight, teacher)
                teacher_logits = (1 - mix_share) * teacher_logits + mix_share * second
            log_q = teacher_logits.log_softmax(-1)
    targets = None if target_ids is None else target_ids[rows]
    divergence_of = divergence if precision == torch.float64 else textbook_divergence

    if cached_ids is not None and cached_logprobs is not None:
        tail = tail and cached_ids.shape[-1] < log_p.shape[-1]
        student_buckets = bucketed(student_logits, cached_ids[rows], tail)
        teacher_buckets = bucketed_logprobs(cached_logprobs[rows].double(), tail)
        value = divergence_of(student_buckets, teacher_buckets, alpha, normalize)
    elif teacher_logits is None or log_q is None:
        raise ValueError("a teacher is needed: teacher_hidden, or cached_ids and cached_logprobs")
    elif sampled:
        if targets is None:
            raise ValueError("sampled needs target_ids")
        value = sampled_divergence(log_p, log_q, targets)
    elif topk is not None:
        tail = tail and topk < log_p.shape[-1]
        ids = (student_logits if topk_of == "student" else teacher_logits).detach().topk(topk, -1).indices
        student_buckets, teacher_buckets = bucketed(student_logits, ids, tail), bucketed(teacher_logits, ids, tail)
        value = divergence_of(student_buckets, teacher_buckets, alpha, normalize)
    elif entry_clip is not None:
        value = clipped_divergence(log_p, log_q, alpha, entry_clip, normalize)
    else:
        value = divergence_of(log_p, log_q, alpha, normalize)

    if old_logprobs is not None:
        if targets is None:
            raise ValueError("old_logprobs needs target_ids")
        value = value * importance_weight(at(log_p, targets), old_logprobs[rows].double(), importance_clip)

    def to_all_rows(values: Tensor) -> Tensor:
        return torch.zeros_like(weights).index_put((rows,), values.to(weights.dtype))

    per_token = to_all_rows(value) * weights
    total = weights.sum() if len(rows) else weights.new_ones(())
    loss = {"none": per_token, "sum": per_token.sum(), "mean": per_token.sum() / total}[reduction]
    return ReferenceOutput(
        loss=loss,
        per_token=per_token.detach(),
        student_logprobs=None if targets is None else to_all_rows(at(log_p, targets).detach()),
        teacher_logprobs=None if targets is None or log_q is None else to_all_rows(at(log_q, targets)),
        student_entropy=to_all_rows(entropy(log_p).detach()),
        teacher_entropy=None if log_q is None else to_all_rows(entropy(log_q)),
        active_tokens=len(rows),
    )


__all__ = [
    "IDENTITY",
    "ReferenceOutput",
    "Transform",
    "at",
    "bucketed",
    "bucketed_gradient",
    "bucketed_logprobs",
    "clipped_divergence",
    "clipped_divergence_gradient",
    "contributions",
    "divergence",
    "divergence_gradient",
    "entropy",
    "entropy_gradient",
    "final_logits",
    "importance_weight",
    "linear_divergence_reference",
    "log_mixture",
    "sampled_divergence",
    "sampled_divergence_gradient",
    "textbook_divergence",
]
