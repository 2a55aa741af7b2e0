"""Turns a tile of logits into row values and a gradient tile, in plain torch operations.

What differs from the obvious: the element-wise part runs over a few rows at a time through preallocated scratch, so
that on a CPU its dozens of passes stay in cache, and the gradient overwrites the student's logits. The passes
themselves, and why they are exact, are in `elementwise.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Objective, RowValues, TileRows, in_float64
from .elementwise import (
    FAR,
    Scratch,
    blocks_of,
    centre_,
    chain_,
    clipped_terms,
    column_squares,
    divergence_terms,
    exponential_sums,
    finalise_,
    growth_sums,
    is_close,
    logprob_gradient_,
    narrow_,
)
from .head import Head
from .tiling import BLOCK_BYTES_PER_ENTRY, block_rows, gradient_view
from .topk import bucket_divergence, tail_share, with_tail

# What `HeadWalk` may project as the teacher: see `TileRows.teacher_is_gap`.
TAKES_GAP = True
# The products with a head (V, H), given also the dtype of the logits.
make_head = Head

__all__ = ["TAKES_GAP", "column_squares", "divergence_tile", "logprob_tile", "make_head", "scratch_bytes", "topk_tile"]


def scratch_bytes(rows: int, vocab: int, device_type: str, topk: int) -> tuple[int, int]:
    """Returns the bytes needed beside the logits of a tile: once, and per row of it."""
    return BLOCK_BYTES_PER_ENTRY * vocab * min(max(rows, 1), block_rows(vocab, device_type)), 0


def divergence_tile(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    rows: TileRows,
    objective: Objective,
    *,
    want_gradient: bool,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[RowValues, Tensor | None]:
    """Destroys both logits (C, V); the gradient, with respect to the raw projection, lies in `student_logits`."""
    parts = []
    gradient = gradient_view(student_logits, gradient_dtype) if want_gradient else None
    for block, scratch in blocks_of(student_logits):
        parts.append(
            _divergence_block(
                student_logits[block],
                None if teacher_logits is None else teacher_logits[block],
                rows.part(block),
                objective,
                scratch,
                want_gradient,
            )
        )
        if gradient is not None:
            narrow_(student_logits[block], gradient[block])
    values = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return RowValues._make(values), gradient


def logprob_tile(
    logits: Tensor,
    rows: TileRows,
    objective: Objective,
    *,
    grad_logprobs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Returns log-probabilities of `rows.target_ids` (C,), entropy (C,), and the tile of the given gradients'."""
    logprobs, entropies = [], []
    want_gradient = grad_logprobs is not None or grad_entropy is not None
    gradient = gradient_view(logits, gradient_dtype) if want_gradient else None
    for block, scratch in blocks_of(logits):
        z, target_ids = logits[block], None if rows.target_ids is None else rows.target_ids[block]
        slope = finalise_(z, objective.student, rows.student_bias)
        side = _normalise(z, scratch.neg_p, scratch.a)
        scratch.neg_p.mul_(-1.0 / side.total)
        entropies.append(side.entropy)
        if target_ids is not None:
            logprobs.append(side.logprobs_at(target_ids))
        if gradient is None:
            continue
        of_target = None if grad_logprobs is None or target_ids is None else grad_logprobs[block][:, None]
        of_entropy = None if grad_entropy is None else grad_entropy[block][:, None]
        logprob_gradient_(z, scratch.neg_p, side.entropy[:, None] - side.log_sum, of_target, of_entropy)
        if of_target is not None and target_ids is not None:
            z.scatter_add_(1, target_ids[:, None], of_target)
        chain_(z, objective.student, slope)
        narrow_(z, gradient[block])
    return torch.cat(logprobs) if logprobs else None, torch.cat(entropies), gradient


def topk_tile(logits: Tensor, rows: TileRows, objective: Objective, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k most likely ids (C, k), most likely first, and their log-probabilities (C, k)."""
    finalise_(logits, objective.student, rows.student_bias)
    values, ids = logits.topk(k, dim=-1)
    # The largest goes first: beside logits of 10⁴ the log of a sum has no digits left.
    largest = values[:, :1]
    return ids, (values - largest) - logits.sub_(largest).logsumexp(-1, keepdim=True)


class Side(NamedTuple):
    """Holds one distribution of a block: its final logits, shifted where they had to be, and their normalisation."""

    z: Tensor  # (rows, V)
    total: Tensor  # (rows, 1) sum of the exponentials
    log_sum: Tensor  # (rows, 1) its logarithm
    entropy: Tensor  # (rows,) nats

    def logprobs_at(self, ids: Tensor) -> Tensor:
        """Returns the log-probabilities (rows,) of ids (rows,)."""
        return (self.z.gather(1, ids[:, None]) - self.log_sum)[:, 0]


class Teacher(NamedTuple):
    """Relates the teacher of a block to its student; either `t` or `side` is there."""

    u: Tensor  # (rows, V) log q - log p
    t: Tensor | None  # (rows, V) q/p - 1, where the two are close
    side: Side | None  # where they may not be; its exponentials are then in scratch.a
    entropy: Tensor  # (rows,) nats


def _normalise(z: Tensor, exponentials: Tensor, spare: Tensor) -> Side:
    """Writes `e^z` of final logits (rows, V) into `exponentials`, and normalises."""
    sums = exponential_sums(z, exponentials, spare)
    log_sum = sums.total.log()
    return Side(z, sums.total, log_sum, (log_sum - sums.weighted / sums.total)[:, 0])


def _divergence_block(
    z: Tensor,
    z_teacher: Tensor | None,
    rows: TileRows,
    objective: Objective,
    scratch: Scratch,
    want_gradient: bool,
) -> RowValues:
    slope = finalise_(z, objective.student, rows.student_bias)
    student = _normalise(z, scratch.neg_p, scratch.a)
    scratch.neg_p.mul_(-1.0 / student.total)
    teacher = None if z_teacher is None else _teacher(student, z_teacher, rows, objective, scratch)
    ids = rows.target_ids
    student_logprobs = None if ids is None else student.logprobs_at(ids)
    gap = None if ids is None or teacher is None else teacher.u.gather(1, ids[:, None])[:, 0]

    if teacher is None or objective.support == "topk":
        loss = _top_k(student, teacher, rows, objective, scratch)
    elif student_logprobs is not None and gap is not None and objective.support == "sampled":
        loss = _sampled(student, student_logprobs, -gap, rows, scratch)
    else:
        loss = _full_vocabulary(student, teacher, objective, scratch)
    if want_gradient:
        chain_(z, objective.student, slope)
    return RowValues(
        loss,
        student_logprobs,
        None if gap is None or student_logprobs is None else student_logprobs + gap,
        student.entropy,
        None if teacher is None else teacher.entropy,
    )


def _teacher(student: Side, z_teacher: Tensor, rows: TileRows, objective: Objective, scratch: Scratch) -> Teacher:
    """Makes the teacher of a block from its raw projection, or from that of the hidden states' difference."""
    if not rows.teacher_is_gap:
        finalise_(z_teacher, objective.teacher, rows.teacher_bias)
    else:
        chain_(z_teacher, objective.student, None)
        if is_close(z_teacher):
            return _close_teacher(student, z_teacher, scratch)
        z_teacher.add_(student.z)
    side = _normalise(z_teacher, scratch.a, scratch.b)
    # In float64, since the one sum may be 1e-40 of the other.
    shift = (in_float64(side.total) / in_float64(student.total)).log_()
    u = torch.sub(side.z, student.z, out=scratch.u).sub_(shift.to(scratch.u))
    return Teacher(u, None, side, side.entropy)


def _close_teacher(student: Side, gap: Tensor, scratch: Scratch) -> Teacher:
    """Makes it from `gap`, teacher's minus student's final logits; no difference is of anything larger.

    With `g = e^gap - 1` and `G = Σ p g`: `u = gap - log(1 + G)` and `q/p - 1 = (g - G) / (1 + G)`. The teacher's logits
    are the student's plus the gap.
    """
    growth, neg_mean = growth_sums(student.z, gap, scratch.neg_p, scratch.a, scratch.b)
    growth.neg_()
    whole, shift = 1 + growth, growth.log1p()
    u = torch.sub(gap, shift, out=scratch.u)
    t = scratch.a.sub_(growth).div_(whole)
    return Teacher(u, t, None, (student.log_sum + shift + neg_mean.div_(whole))[:, 0])


def _full_vocabulary(student: Side, teacher: Teacher, objective: Objective, scratch: Scratch) -> Tensor:
    """Returns the loss (rows,); the student's z becomes its gradient with respect to the final logits."""
    alpha, normalize, z, u = objective.alpha, objective.normalize, student.z, teacher.u
    if objective.entry_clip is not None:
        # Clipped sums are of first order: here an error in the normalisers counts.
        log_p = in_float64(z).log_softmax(-1)
        log_q = log_p + in_float64(u) if teacher.side is None else in_float64(teacher.side.z).log_softmax(-1)
        loss, numerators = clipped_terms(log_p, log_q, alpha, normalize, objective.entry_clip)
        z.copy_(numerators - log_p.exp() * numerators.sum(-1, keepdim=True))
        return loss.to(z)
    if teacher.t is None and u.amax() > FAR:
        log_p = in_float64(z) - in_float64(student.log_sum)
        loss, gradient = bucket_divergence(log_p, log_p + in_float64(u), alpha, normalize)
        z.copy_(gradient)
        return loss.to(z)
    terms = divergence_terms(z, u, teacher.t, scratch, alpha, normalize)
    centre_(z, scratch.neg_p, terms.centre, terms.factor)
    return terms.loss


def _sampled(student: Side, log_p: Tensor, gap: Tensor, rows: TileRows, scratch: Scratch) -> Tensor:
    """Returns sg(log p(y) - log q(y))·log p(y), the reverse KL's score-function form, given the bracket."""
    torch.mul(scratch.neg_p, gap[:, None], out=student.z)
    if rows.target_ids is not None:
        student.z.scatter_add_(1, rows.target_ids[:, None], gap[:, None])
    return gap * log_p


def _top_k(student: Side, teacher: Teacher | None, rows: TileRows, objective: Objective, scratch: Scratch) -> Tensor:
    """Returns the loss (rows,) over k ids and the tail; z becomes its gradient with respect to the final logits."""
    z = student.z
    ids = rows.teacher_ids
    if ids is None:
        chooser = z
        if teacher is not None and objective.topk_of == "teacher":
            chooser = torch.add(z, teacher.u, out=scratch.b) if teacher.side is None else teacher.side.z
        ids = chooser.topk(objective.topk, dim=-1, sorted=False).indices
    tail = objective.tail and ids.shape[1] < z.shape[1]
    log_p = in_float64(z.gather(1, ids)) - in_float64(student.log_sum)
    tail_p = -_mass_outside(ids, scratch.neg_p) if tail else None
    buckets_p = with_tail(log_p, tail_p, tail)
    if teacher is not None:
        log_q = log_p + in_float64(teacher.u.gather(1, ids))
        tail_q = None
        if tail_p is not None and teacher.side is not None:
            tail_q = _mass_outside(ids, scratch.a) / in_float64(teacher.side.total[:, 0])
        elif tail_p is not None and teacher.t is not None:
            tail_q = tail_p - in_float64(torch.mul(scratch.neg_p, teacher.t, out=scratch.b).sum(-1))
        buckets_q = with_tail(log_q, tail_q, tail)
    elif rows.teacher_logprobs is not None:
        buckets_q = with_tail(in_float64(rows.teacher_logprobs), None, tail)
    loss, gradient = bucket_divergence(buckets_p, buckets_q, objective.alpha, objective.normalize)
    gradient = gradient.to(z)
    if tail_p is not None:
        torch.mul(scratch.neg_p, tail_share(gradient[:, -1], tail_p)[:, None], out=z)
    else:
        z.zero_()
    z.scatter_(1, ids, gradient[:, : ids.shape[1]])
    return loss.to(z)


def _mass_outside(ids: Tensor, masses: Tensor) -> Tensor:
    """Sums each row's masses outside `ids`, which it sets to 0: exact where one minus the listed mass is not."""
    return in_float64(masses.scatter_(1, ids, 0.0).sum(-1))
